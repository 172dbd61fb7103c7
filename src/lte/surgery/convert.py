"""Converting a model in place: group its neurons, make experts contiguous, put in routers, fit them, switch modes."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import PreTrainedModel

from lte.core.grouping import grouping_permutation
from lte.modules.recording import sparse_layers
from lte.modules.sparse_ffn import Mode, Roles, Selecting, SparseActivation, SparseFFN
from lte.modules.tensor_parallel import check_not_shared
from lte.surgery.activations import first_tokens, record_inputs
from lte.surgery.architectures import become_lte_, dense_class, dense_config, lte_model_class
from lte.surgery.method import Method
from lte.surgery.sites import Site, find_sites
from lte.surgery.teal import SECTION as TEAL

RECORDED_TOKENS = 4096
"""How many tokens grouping by co-activation looks at."""


def sparsify_(
    model: PreTrainedModel,
    method: Method,
    data: Iterable[dict[str, Tensor]] | None = None,
    progress: Callable[[Iterable[Site]], Iterable[Site]] = iter,
) -> PreTrainedModel:
    """Give every FFN of ``model`` experts and a router, in place.

    With a method that is trained (LTE) the function stays the same (mode dense). One that needs no training sets its
    routers on ``data``, and the model is sparse at once (mode hard).

    Neurons are reordered so that each expert is contiguous, routers are initialised from the
    method's seed, and the model's class becomes ``LTE...`` so that it saves under its own name.
    Parameter names stay as Hugging Face has them; only ``router.*`` is new, and ``compensation.*`` where asked for.

    Args:
        model: a Hugging Face model of a known family (see ``lte.Family``), with any head.
        method: which method, e.g. ``lte.LTEConfig(expert_size=32)``; its type picks it.
        data: batches for the model, read as far as the method needs them: to group by co-activation, or to set its
            routers. What 4096 tokens do to the neurons is kept in bf16 on the CPU while grouping by co-activation:
            0.4 GB for a model of 135M parameters, 3 GB for one of 7B.
        progress: wraps the iteration over FFNs, e.g. in a progress bar.

    Returns:
        The same model.

    Raises:
        ValueError: unknown family, expert size that does not divide d_ff, already sparse, divided by tensor
            parallelism, data missing. The model is then as it was.
    """
    sites = _checked(model, method)
    batches = _needed(data, method, max(RECORDED_TOKENS * method.needs_activations, method.fit_tokens))
    undo = method.prepare_(model)
    try:
        orders = list(group(model, sites, method, batches, progress))  # all before routers go in
    except BaseException:
        undo()
        raise
    for site, order in zip(sites, orders, strict=True):
        site.permute_neurons(order)
    _put_in(model, sites, method)
    method.fit(model, batches)
    return model


def install_routers_(model: PreTrainedModel, method: Method) -> PreTrainedModel:
    """Give every FFN a router, and leave all else to training: neurons stay where they are, routers as they are drawn.

    For ``LTETrainer``, which groups and fits on the weights that its dense stage leaves.

    Raises:
        ValueError: as :func:`sparsify_`, but no data is needed.
    """
    sites = _checked(model, method)
    method.prepare_(model)
    _put_in(model, sites, method, grouped=False)
    return model


def _checked(model: PreTrainedModel, method: Method) -> list[Site]:
    """The FFNs of a model that the method can convert."""
    if any(isinstance(module, Selecting) for module in model.modules()) or hasattr(model.config, TEAL):
        raise ValueError("the model is sparse already: load the dense checkpoint to convert it again")
    check_not_shared(model, "sparsify_ groups")
    sites = find_sites(model, model.config.model_type)
    for site in sites:
        site.check()
        method.check(site)
    weights = [linear.weight for site in sites for linear in site.projections()]
    if len({id(weight) for weight in weights}) < len(weights):
        raise ValueError(f"{type(model).__name__} shares FFN weights between layers: that is not supported")
    lte_model_class(type(model))  # made now, so that an error leaves the model as it was
    return sites


def _put_in(model: PreTrainedModel, sites: list[Site], method: Method, grouped: bool = True) -> None:
    generator = torch.Generator().manual_seed(method.seed)
    for site in sites:
        install_(site, method).reset(generator)
    become_lte_(model, {**method.to_dict(), "mode": "dense", **({} if grouped else {"grouped": False})})


def _needed(data: Iterable[dict[str, Tensor]] | None, method: Method, tokens: int) -> list[dict[str, Tensor]]:
    if not tokens:
        return []
    if data is None:
        raise ValueError(f"this {type(method).__name__} needs data: pass sparsify_(model, config, data=batches)")
    batches = first_tokens(data, tokens)
    if not batches:
        raise ValueError(f"this {type(method).__name__} needs data, but the data is empty")
    return batches


def group(
    model: PreTrainedModel,
    sites: list[Site],
    method: Method,
    data: Iterable[dict[str, Tensor]],
    progress: Callable[[Iterable[Site]], Iterable[Site]] = iter,
) -> Iterator[Tensor]:
    """The order of each site's neurons that makes the method's experts contiguous. Changes nothing.

    Args: as :func:`sparsify_`; ``model`` may be sparse already, in mode dense.
    """
    activations = _record_neurons(model, sites, data) if method.needs_activations else []
    for labels_F, _site in zip(method.group(sites, activations), progress(sites), strict=True):
        yield grouping_permutation(labels_F)


def regroup_(
    model: PreTrainedModel,
    method: Method,
    data: Iterable[dict[str, Tensor]],
    progress: Callable[[Iterable[Site]], Iterable[Site]] = iter,
) -> None:
    """Group the neurons of a sparse model in mode dense (anew), on the weights that it has by now (LTE paper, 4.1).

    All ranks take the order that the first finds.

    Args:
        data: read by a method that groups by activations; others read none.
        progress: as :func:`sparsify_`.
    """
    sites = find_sites(model, model.config.model_type)
    for site, order in zip(sites, group(model, sites, method, data, progress), strict=True):
        site.permute_neurons(broadcast(order.to(model.device)))  # pyright: ignore[reportArgumentType]
    model.config.lte.pop("grouped", None)


def install_(site: Site, method: Method) -> SparseFFN | SparseActivation:
    """Put a sparse FFN where the dense one is. Neurons must be in order; the router is left uninitialised."""
    weight = site.first.weight
    assert isinstance(weight, Tensor)
    router = method.build_router(site, weight.device).to(weight.dtype)
    compensation = method.build_compensation(site, weight.device)
    if compensation is not None:
        compensation.to(weight.dtype)
    family = site.family
    if family.site is None:
        sparse = SparseActivation(site.module(family.act), site.first, site.down, router, method.tau, compensation)
        place = family.act
    else:
        child = {
            role: path.rpartition(".")[2]
            for role in ("up", "down", "act", "gate", "hidden_dropout", "output_dropout")
            if (path := getattr(family, role))
        }
        roles = Roles(**child, fused_gate_up=family.fused_gate_up)
        sparse = SparseFFN(site.module(family.site), roles, router, method.tau, compensation)
        place = family.site
    sparse.train(site.layer.training)
    parent, _, name = place.rpartition(".")
    setattr(site.layer.get_submodule(parent), name, sparse)
    return sparse


def densify(model: PreTrainedModel) -> PreTrainedModel:
    """A plain Hugging Face model with the same weights: what ``model`` computes in mode dense, without ``lte``.

    A dense baseline becomes a checkpoint that any method can convert. Neurons stay in the order :func:`sparsify_` gave.

    Args:
        model: with sparse FFNs; left as it is.

    Returns:
        A new model on the same device; the two share no weights.

    Raises:
        ValueError: a model without sparse FFNs, or one that is divided by tensor parallelism.
    """
    check_not_shared(model, "densify copies")
    ours = tuple(f"{name}.{child}." for name in sparse_layers(model) for child in ("router", "compensation"))
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(ours)}
    plain = dense_class(type(model)).from_pretrained(
        None, config=dense_config(model.config), state_dict=weights, dtype=model.dtype
    )
    if model.can_generate():
        plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.to(model.device).train(model.training)


def set_mode_(model: nn.Module, mode: Mode) -> None:
    """Switch every sparse FFN to ``"dense"``, ``"soft"`` or ``"hard"``. The mode is saved with the model.

    Raises:
        ValueError: unknown mode, or a model without sparse FFNs.
    """
    for layer in sparse_layers(model).values():
        layer.set_mode(mode)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "lte"):
        config.lte["mode"] = mode


def _record_neurons(model: PreTrainedModel, sites: list[Site], data: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """Neurons of every FFN on up to 4096 tokens of ``data``: one ``[T, F]`` a site.

    In bf16: half the memory, and the largest neurons do not overflow.
    """
    return record_inputs(model, [(site.name, site.down, Tensor.bfloat16) for site in sites], data, RECORDED_TOKENS)
