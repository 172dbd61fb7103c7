"""Finding FFNs in a model, and reordering their neurons. Works on ``nn.Linear`` and GPT-2's ``Conv1D``."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from lte.modules.router import Reads
from lte.modules.sparse_ffn import Selecting
from lte.surgery.families import Family, check_family, family_rows


@dataclass(frozen=True)
class Site:
    """One FFN of a model: a layer, its name in the model, and the family row that describes it."""

    name: str
    layer: nn.Module
    family: Family

    def module(self, path: str) -> nn.Module:
        return self.layer.get_submodule(path)

    @property
    def place(self) -> str:
        """Path of the module that converting replaces: the FFN, or its activation where it is no module of its own."""
        return self.family.site or self.family.act

    @property
    def installed(self) -> Selecting:
        """What stands there once the model is sparse."""
        module = self.module(self.place)
        assert isinstance(module, Selecting)
        return module

    @property
    def first(self) -> nn.Module:
        """The projection whose rows are the neurons' features: the gate in a gated FFN."""
        return self.module(self.family.gate or self.family.up)

    @property
    def down(self) -> nn.Module:
        return self.module(self.family.down)

    @property
    def d_ff(self) -> int:
        return _sizes(self.down)[0]

    @property
    def d_model(self) -> int:
        return _sizes(self.first)[0]

    @property
    def gated(self) -> bool:
        return self.family.gate is not None or self.family.fused_gate_up

    @property
    def num_weights(self) -> int:
        """Weights of all its matrices, biases not counted."""
        sizes = (_sizes(linear) for linear in self.projections())
        return sum(d_in * d_out for d_in, d_out in sizes)

    def weights_before(self, reads: Reads) -> int:
        """Weights multiplied to compute, for all neurons, what a router reads."""
        if reads == "input":
            return 0
        return self.d_model * self.d_ff * (2 if reads == "neurons" and self.gated else 1)

    def projections(self) -> list[nn.Module]:
        return [self.module(path) for path in self._projection_paths()]

    def _projection_paths(self) -> list[str]:
        return [path for path in (self.family.gate, self.family.up, self.family.down) if path]

    def check_projections(self) -> None:
        """Raise ValueError unless the projections are plain linear layers with weights that can be reordered.

        A projection may not be wrapped, quantised or on the meta device.
        """
        for path in self._projection_paths():
            linear, where = self.module(path), f"{self.name}.{path}"
            if not isinstance(linear, nn.Linear | Conv1D):
                raise ValueError(
                    f"{where} is a {type(linear).__module__}.{type(linear).__name__}, not a linear layer: give the "
                    "plain model (merge adapters first, e.g. with merge_and_unload; add new ones afterwards)"
                )
            _sizes(linear)
            if type(linear.weight) is not nn.Parameter:  # some quantisers show a float's dtype
                kind = type(linear.weight).__name__
                raise ValueError(f"{where} keeps its weight as a {kind}: load the model unquantised and whole")
            if linear.weight.is_meta:
                raise ValueError(f"{where} is on the meta device: load the model's weights first, without offloading")

    def check(self) -> None:
        """Raise ValueError unless the FFN is as its family's row says and its weights can be reordered.

        In addition to :meth:`check_projections`, sizes must match, and the row must name all parts.
        """
        family = self.family
        self.check_projections()
        widths = {path: _sizes(self.module(path))[1] for path in self._projection_paths()[:-1]}
        expected = {path: self.d_ff * (2 if family.fused_gate_up else 1) for path in widths}
        if widths != expected:
            raise ValueError(f"{self.name} has a down projection of {self.d_ff} neurons, but widths {widths}")
        if family.site is None:
            place, named = self.module(family.act), set()
        else:
            roles = (family.act, family.hidden_dropout, family.output_dropout, *self._projection_paths())
            place, named = self.module(family.site), {path.rpartition(".")[2] for path in roles if path}
        unnamed = {name for name, _ in place.named_parameters() if name.partition(".")[0] not in named}
        unnamed |= {name for name, child in place.named_children() if name not in named and not _is_nothing(child)}
        if unnamed:
            raise ValueError(
                f"{self.name}: the row of {family.layer} names no role for {', '.join(sorted(unnamed))}, "
                "so converting would change what the model computes"
            )

    def feature_rows(self) -> Tensor:
        """``[F, D]``: one row a neuron, from the first FFN weight (of a fused gate and up: the gate's half)."""
        linear = self.first
        weight = linear.weight
        assert isinstance(weight, Tensor)
        rows = weight.T if isinstance(linear, Conv1D) else weight
        return rows[: self.d_ff].detach()

    def down_rows(self) -> Tensor:
        """``[F, D]``: what each neuron adds to the output when it is 1."""
        weight = self.down.weight
        assert isinstance(weight, Tensor)
        return (weight if isinstance(self.down, Conv1D) else weight.T).detach()

    @torch.no_grad()
    def permute_neurons(self, order_F: Tensor) -> None:
        """Reorder the neurons in every projection. The FFN computes the same function."""
        family = self.family
        up_order = torch.cat([order_F, order_F + self.d_ff]) if family.fused_gate_up else order_F
        if family.gate:
            _reorder(self.module(family.gate), order_F, "out")
        _reorder(self.module(family.up), up_order, "out")
        _reorder(self.down, order_F, "in")


def find_sites(model: nn.Module, model_type: str) -> list[Site]:
    """The FFNs of a dense model, in the order of its layers.

    Raises:
        ValueError: unknown family, or a known one whose FFNs are not where its row says.
    """
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig) and config.model_type == model_type:
        check_family(config)
    rows = family_rows(model_type)
    sites = list(_matching(model, rows))
    if not sites:
        raise ValueError(
            f"no FFN found in {type(model).__name__}: no layer of class "
            f"{' or '.join(sorted({row.layer for row in rows}))} has {rows[0].up}, {rows[0].down} and {rows[0].act}; "
            f"correct the row with lte.register_family({model_type!r}, ..., replace=True)"
        )
    return sites


def block_linears(model: nn.Module, model_type: str) -> dict[str, nn.Linear | Conv1D]:
    """Every linear layer, by name, of the blocks that hold an FFN: attention and FFN; neither head nor embedding.

    Raises:
        ValueError: as :func:`find_sites`.
    """
    blocks = {block_of(site.name) for site in find_sites(model, model_type)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(name.startswith(f"{block}.") for block in blocks)
    }


def block_of(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp``: up to the first number."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def _matching(model: nn.Module, rows: tuple[Family, ...]) -> Iterator[Site]:
    for name, module in model.named_modules():
        row = next((row for row in rows if row.fits(module)), None)
        if row is not None:
            yield Site(name, module, row)


def _is_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    weight = linear.weight
    if not isinstance(weight, Tensor):  # dynamic quantisation puts a method there
        raise ValueError(f"{type(linear).__name__} holds quantised weights: load the model unquantised")
    if weight.ndim != 2 or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ValueError(
            f"{type(linear).__name__} holds quantised weights ({weight.dtype} of shape {tuple(weight.shape)}): "
            "load the model unquantised (or from GGUF, which is dequantised on loading)"
        )
    d_out, d_in = weight.shape[::-1] if isinstance(linear, Conv1D) else weight.shape
    return d_in, d_out


def _reorder(linear: nn.Module, order: Tensor, side: str) -> None:
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    dim = int((side == "in") != isinstance(linear, Conv1D))
    order = order.to(weight.device)
    weight.copy_(weight.index_select(dim, order))
    if side == "out" and isinstance(bias, Tensor):
        bias.copy_(bias[order])
