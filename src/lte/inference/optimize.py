"""``optimize_`` prepares a trained sparse model for decoding. Packing changes the memory layout alone."""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lte.inference.generate import generate_packed
from lte.inference.graphs import Replays
from lte.inference.other_weights import quantise_others_, torchao
from lte.inference.packed import (
    BYPASSED,
    Bypassed,
    Packed,
    PackedActivation,
    PackedFFN,
    PackedLayer,
    Projection,
    activation_name,
)
from lte.inference.packed_linear import pack_linears_
from lte.modules.input_threshold import cut_layers
from lte.modules.offloading import check_in_memory
from lte.modules.quantised_linear import QuantisedLinear
from lte.modules.recording import check_hard, check_lte_routers, sparse_layers
from lte.modules.sparse_ffn import Selecting, SparseFFN
from lte.modules.tensor_parallel import check_not_shared
from lte.ops.quantise import Quantised
from lte.ops.sparse_ffn import BACKENDS, BackendName
from lte.surgery.architectures import FASTER_GENERATE
from lte.surgery.linears import check_plain
from lte.surgery.quantise import quantise_, weights_of
from lte.surgery.sites import FFNSite, find_sites


def optimize_(
    model: PreTrainedModel, backend: BackendName = "auto", weights: Quantised | None = None
) -> PreTrainedModel:
    """Make ``model`` skip its idle experts and small inputs, in place. ``model.generate()`` works as before.

    The model is put in eval mode, and its FFN weights get one contiguous row for each neuron. Linear layers with a
    threshold on their inputs (``attention_sparsity``, TEAL) get one row for each input. On a GPU, a step of one token
    does not read the rows of small inputs. Parameter names and values do not change, so the model saves, loads, moves
    and casts as before. Layers still compute all experts with gradients, in training, under autocast, in another mode,
    and if projections are wrapped later (LoRA). A second call changes the backend.

    Quantised experts (``weights``, or a model of :func:`lte.quantise_`) cannot be trained. The linear layers of the
    blocks outside of the FFNs are then quantised by torchao, and the model cannot be saved any more. Routers,
    compensations and embeddings stay floats, and so does the head, unless the model is on a CPU.

    Args:
        model: sparse and in mode hard, as it is after training, or with TEAL's thresholds.
        backend: ``auto`` takes the fastest for each call. A named backend runs or raises, see :func:`lte.sparse_ffn`.
        weights: ``int8`` or ``int4`` quantises the model. None leaves the experts as they are.

    Returns:
        The same model.

    Raises:
        ValueError: the backend is unknown. The model is dense, in mode dense or soft, or of another method.
            Projections are quantised by another library, adapted or of mixed precision. ``sparse_ffn`` does not know
            the activation. Weights are divided by tensor parallelism or offloaded. The experts have another quantised
            form already, or :func:`lte.quantise_` refuses them. In all cases the model is not changed.
        ImportError: the model is quantised, and torchao is missing.
    """
    found, stored = _checked_sites(model, backend, weights), weights_of(model)
    if weights or stored:
        torchao()
    if weights is not None and weights != stored:
        quantise_(model, weights)  # in place: the projections that were found are the same modules
    _pack_(found)
    setattr(model, FASTER_GENERATE, generate_packed)
    if form := weights_of(model):
        quantise_others_(model, form)
    pack_linears_(cut_layers(model), backend)
    return model.eval()


def pack_ffns_(model: PreTrainedModel, backend: BackendName = "auto") -> None:
    """Make only the FFNs of ``model`` skip idle experts, in place, for an engine that runs all other layers itself.

    The FFNs of a model of TEAL do not change.

    Raises:
        ValueError: as :func:`optimize_`. The model is not changed then.
    """
    _pack_(_checked_sites(model, backend))


def _checked_sites(
    model: PreTrainedModel, backend: BackendName, weights: Quantised | None = None
) -> list[tuple[Selecting, Packed]]:
    """Return the sparse FFNs with what they need to skip experts; none for a model that has thresholds alone.

    Raises:
        ValueError: the model cannot be packed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, but it is one of {', '.join(BACKENDS)}")
    check_not_shared(model, "optimize_ packs")
    check_in_memory(model)
    routed = not cut_layers(model) or weights or any(isinstance(module, Selecting) for module in model.modules())
    return _packed_sites(model, backend) if routed else []


def _pack_(found: list[tuple[Selecting, Packed]]) -> None:
    for layer, packed in found:
        for projection in (packed.gate, packed.up, packed.down):
            if projection is not None:
                projection.pack_()
        layer.lte_router.fold_temperature()
        _become_packed_(layer, packed)


def _packed_sites(model: PreTrainedModel, backend: BackendName) -> list[tuple[Selecting, Packed]]:
    """Return the sparse FFNs with what they need to skip experts. All are checked before the first is changed."""
    layers = sparse_layers(model).values()
    check_lte_routers(layers, "its kernels cannot run it, use the model as it is, it computes the same")
    check_hard(layers, "which uses every expert")
    return [(site.installed, _packed(site, backend)) for site in find_sites(model, model.config.model_type)]


def _packed(site: FFNSite, backend: BackendName) -> Packed:
    """Return what the site's layer needs to skip experts.

    Raises:
        ValueError: it cannot be computed by ``sparse_ffn``.
    """
    family = site.family
    dtypes = {path: _dtype(f"{site.name}.{path}", site.module(path)) for path in site.paths}
    if len(set(dtypes.values())) > 1:
        text = ", ".join(f"{path} {str(dtype).removeprefix('torch.')}" for path, dtype in dtypes.items())
        raise ValueError(
            f"{site.name} mixes precisions ({text}): make them one, e.g. model.to(torch.bfloat16) or model.float()"
        )
    layer = site.installed
    module = getattr(layer, "act", None) if family.site is None else site.module(family.act)
    assert isinstance(module, nn.Module)
    act = activation_name(module)
    if act is None:
        raise ValueError(
            f"{site.name}: the activation {type(module).__name__} is not one of lte.sparse_ffn: "
            "use the model as it is, the results are the same"
        )
    absorbed = family.site is None
    if absorbed:
        for path in (family.up, family.down):
            if type(site.module(path)) not in (*BYPASSED, *BYPASSED.values()):
                raise ValueError(
                    f"{site.name}.{path} is a {type(site.module(path)).__name__}: where the FFN is no module of its "
                    "own, only nn.Linear can be bypassed; use the model as it is"
                )
    return Packed(
        up=_projection(site, family.up, down=False, pre_hooks=int(absorbed)),
        down=_projection(site, family.down, down=True, hooks=int(absorbed and layer.compensation is not None)),
        gate=_projection(site, family.gate, down=False) if family.gate else None,
        fused_gate_up=family.fused_gate_up,
        act=act,
        backend=backend,
    )


def _dtype(name: str, linear: nn.Module) -> torch.dtype:
    """Return the dtype of a projection's weight. Raise ValueError unless it is quantised by lte, or plain."""
    if isinstance(linear, QuantisedLinear):
        return linear.matrix.dtype
    check_plain(name, linear)
    return cast(Tensor, linear.weight).dtype


def _projection(site: FFNSite, path: str, down: bool, pre_hooks: int = 0, hooks: int = 0) -> Projection:
    parent, _, name = path.rpartition(".")
    linear = site.module(path)
    return Projection(linear, site.module(parent), name, down == isinstance(linear, nn.Linear), pre_hooks, hooks)


def _become_packed_(layer: Selecting, packed: Packed) -> None:
    if isinstance(layer, SparseFFN):
        layer.__class__ = PackedFFN
    else:
        layer.__class__ = PackedActivation
        assert isinstance(layer, PackedActivation)
        for linear in (packed.up.linear, packed.down.linear):
            if not isinstance(linear, Bypassed):
                linear.__class__ = BYPASSED[type(linear)]
            linear.layer = (layer,)  # pyright: ignore
    assert isinstance(layer, PackedLayer)
    layer.packed = packed
    layer.replays = Replays()
