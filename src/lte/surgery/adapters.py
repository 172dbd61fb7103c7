"""LoRA by ``peft`` on a sparse model (Hu et al., 2021, arXiv 2106.09685): its own weights are frozen.

Beside the adapters, norms, routers, compensation and the head of a classifier train in full, all in fp32. The frozen
model stays whole: :meth:`Adapters.aside` gives it back with its own structure, and :meth:`Adapters.off` computes with
it. So neurons are grouped, routers are fitted, and a teacher runs, without a second copy of the weights.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lte.modules.in_full import InFull
from lte.modules.input_threshold import CUT, cut_layers
from lte.modules.recording import sparse_layers
from lte.modules.router import draw_
from lte.modules.sparse_ffn import Selecting
from lte.surgery.adapter_targets import linears_to_adapt, modules_to_train_in_full
from lte.surgery.sites import find_sites

SCALE = 2.0
"""The factor of the product of an adapter's two matrices, ``lora_alpha / rank``. The learning rate does the rest."""
_NAME = "default"
_VALUES = 64
"""Values of a parameter in a fingerprint."""


class Adapters:
    """What is trained of a sparse model whose own weights are frozen.

    Attributes:
        targets: the names of the linear layers with an adapter.
        dtype: of the frozen weights.
        given: the fingerprint of the given model.
        orders: the new order ``[F]`` of each FFN's neurons, by the FFN's name. It is empty before they are grouped.
        finished: whether everything is merged into the model.
    """

    def __init__(
        self, model: PreTrainedModel, rank: int, targets: Sequence[str] = (), seed: int = 0, autocast: bool = False
    ):
        """Freeze the model, in place, and put what is trained beside it. The model's function does not change.

        Args:
            model: sparse.
            rank: of the adapters.
            targets: names of linear layers, or the last parts of their names. None are all linear layers of the blocks.
            seed: of the adapters' first matrices.
            autocast: whether the model always runs under autocast. Then adapters take inputs in their own dtype, and
                adapters with one input keep one tensor for the backward pass.

        Raises:
            ImportError: peft is missing.
            ValueError: no layer has such a name, or a layer is not plain or has thresholds on its inputs.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError('LoRA needs the package peft: pip install "lte[lora]"') from error
        self.model, self.rank = model, rank
        self.dtype = next(iter(find_sites(model, model.config.model_type))).down_rows().dtype
        self.orders: dict[str, Tensor] = {}
        self.finished = False
        self._before: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self.given = fingerprint(model)
        added = {id(one) for layer in sparse_layers(model).values() for one in _parameters_added(layer)}
        self._trainable = [one for one in model.parameters() if one.requires_grad and id(one) not in added]
        linears = {site.name: site.linear for site in linears_to_adapt(model, targets)}
        self.targets = [*linears]
        in_full = modules_to_train_in_full(model)
        config = LoraConfig(
            r=rank,
            lora_alpha=SCALE * rank,  # pyright: ignore[reportArgumentType]
            target_modules=self.targets,
            fan_in_fan_out=all(isinstance(one, Conv1D) for one in linears.values()),
        )
        inject_adapter_in_model(config, model, _NAME)
        del model.peft_config  # other code takes it as the mark of a model of peft alone
        self._lora: dict[str, Any] = {name: model.get_submodule(name) for name in linears}
        self._in_full = {name: InFull(model.get_submodule(name)) for name in in_full}
        self._places = [
            (*_place(model, name), wrapper, plain)
            for (name, wrapper), plain in zip(
                (*self._lora.items(), *self._in_full.items()),
                (*linears.values(), *(one.plain for one in self._in_full.values())),
                strict=True,
            )
        ]
        self._put([wrapper for _, _, wrapper, _ in self._places])
        for wrapper in self._lora.values():
            wrapper.lora_A.float()
            wrapper.lora_B.float()
            wrapper.cast_input_dtype_enabled = not autocast
        for module in self._added.values():
            module.float().requires_grad_(True)
        self._draw()

    @property
    def _added(self) -> dict[str, nn.Module]:
        """The modules that a conversion added: routers and compensations."""
        return {
            f"{name}.{child}": module
            for name, layer in sparse_layers(self.model).items()
            for child in ("router", "compensation")
            if (module := getattr(layer, child)) is not None
        }

    @property
    def matrices(self) -> list[Tensor]:
        """The matrices of the adapters."""
        pairs = ((wrapper.lora_A, wrapper.lora_B) for wrapper in self._lora.values())
        return [one[_NAME].weight for pair in pairs for one in pair]

    def _put(self, modules: Iterable[nn.Module]) -> None:
        for (parent, child, _, _), module in zip(self._places, modules, strict=True):
            parent._modules[child] = module  # of two kinds of modules, which a class may declare otherwise

    @torch.no_grad()
    def _draw(self) -> None:
        """Begin anew with adapters that add nothing. All ranks draw the same numbers."""
        for wrapper in self._lora.values():
            draw_(wrapper.lora_A[_NAME].weight, self._generator)
            wrapper.lora_B[_NAME].weight.zero_()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Give the model its own structure inside the context: the frozen layers stand in their places."""
        if self.finished:
            yield
            return
        self._put([plain for _, _, _, plain in self._places])
        try:
            yield
        finally:
            self._put([wrapper for _, _, wrapper, _ in self._places])

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the frozen layers alone compute inside the context, also in blocks that are compiled."""
        self._switch(off=True)
        try:
            yield
        finally:
            self._switch(off=False)

    def _switch(self, off: bool) -> None:
        for wrapper in self._lora.values():
            wrapper.enable_adapters(not off)
        for wrapper in self._in_full.values():
            wrapper.off = off

    def absorb(self) -> None:
        """Add to the frozen weights what was trained so far, and train new adapters from now on.

        It is called once, before neurons are grouped. A checkpoint keeps these first adapters, and loading adds them
        again. So it needs no second copy of the model.
        """
        self._before = {name: value.detach().clone() for name, value in self._adapted().items()}
        self._merge()
        self._draw()

    def finish(self) -> None:
        """Merge all that was trained into the model, which is then a sparse model like any other, in its own dtype."""
        if self.finished:
            return
        self._merge()
        self._put([plain for _, _, _, plain in self._places])
        for module in self._added.values():
            module.to(self.dtype)
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        self.finished = True

    @torch.no_grad()
    def _merge(self) -> None:
        for wrapper in self._lora.values():
            weight = wrapper.base_layer.weight
            weight.copy_(weight.float() + wrapper.get_delta_weight(_NAME))
        for wrapper in self._in_full.values():
            wrapper.plain.load_state_dict(wrapper.trained.state_dict())

    def _adapted(self) -> dict[str, Tensor]:
        """Return the trained tensors in the model's own layers, by name. They are not copies."""
        found = {
            f"{name}.{part}": getattr(wrapper, part)[_NAME].weight
            for name, wrapper in self._lora.items()
            for part in ("lora_A", "lora_B")
        }
        for name, wrapper in self._in_full.items():
            found |= {f"{name}.{key}": value for key, value in wrapper.trained.state_dict().items()}
        return found

    def _trained(self) -> dict[str, Tensor]:
        """Return all that is trained or set in training, by name. The tensors are not copies."""
        found = self._adapted()
        for name, module in self._added.items():
            found |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        return found | {f"{name}.{CUT}": linear.get_buffer(CUT) for name, linear in cut_layers(self.model).items()}

    def state(self) -> dict[str, Tensor]:
        """Return all tensors by which :meth:`load` makes the same model from the one that was given."""
        parts = {"before": self._before, "order": self.orders, "now": self._trained()}
        return {f"{part}.{name}": value.detach() for part, held in parts.items() for name, value in held.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the result of :meth:`state`. The model must be as it was given, with new adapters.

        Raises:
            ValueError: a tensor is missing, left over or of another shape.
        """
        before, orders, now = (
            {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
            for part in ("before.", "order.", "now.")
        )
        if before:
            _copy(before, self._adapted())
            self.absorb()
        with self.aside():
            for site in find_sites(self.model, self.model.config.model_type):
                if site.name in orders:
                    site.permute_neurons(orders[site.name])
        self.orders = orders
        _copy(now, self._trained())


def fingerprint(model: PreTrainedModel) -> str:
    """Return a fingerprint of the dense weights of a sparse model and of the order of its neurons.

    It reads the weights by which neurons add to the first output, and some values of each parameter. A head for
    classification may be new and does not count.
    """
    added = {id(one) for layer in sparse_layers(model).values() for one in _parameters_added(layer)}
    body, head = model.base_model, model.get_output_embeddings()
    dense = [one for one in (*body.parameters(), *(() if head is None else head.parameters())) if id(one) not in added]
    read = [site.down_rows()[:, 0] for site in find_sites(model, model.config.model_type)]
    read += [one.detach().flatten()[:: max(1, one.numel() // _VALUES)] for one in dense]
    values = (one.contiguous().view(torch.uint8).cpu().numpy().tobytes() for one in read)
    return blake2b(b"".join(values), digest_size=16).hexdigest()


def _parameters_added(layer: Selecting) -> Iterator[nn.Parameter]:
    yield from layer.router.parameters()
    if layer.compensation is not None:
        yield from layer.compensation.parameters()


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, child = name.rpartition(".")
    return model.get_submodule(parent), child


@torch.no_grad()
def _copy(state: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    if wrong := sorted(state.keys() ^ into.keys()):
        raise ValueError(f"the adapter and the model do not belong together: only one of them has {wrong[0]}")
    for name, value in state.items():
        if value.shape != into[name].shape:
            shapes = f"{tuple(value.shape)} and {tuple(into[name].shape)}"
            raise ValueError(f"the adapter and the model do not belong together: {name} has shapes {shapes}")
        into[name].copy_(value)
