"""Gives FFNs experts: orders neurons so that experts are contiguous, and replaces dense FFNs by sparse ones."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from accelerate.utils import broadcast
from torch import Tensor
from transformers import PreTrainedModel

from lte.core.grouping import grouping_permutation
from lte.modules.sharding import is_sharded, whole
from lte.modules.sparse_ffn import Roles, SparseActivation, SparseFFN
from lte.surgery.activations import record_inputs
from lte.surgery.conversion import Batch, Progress, section_of
from lte.surgery.sites import FFNSite, find_sites

if TYPE_CHECKING:
    from lte.surgery.method import Method

RECORDED_TOKENS = 4096
"""The number of tokens for grouping by co-activation."""


def group(
    model: PreTrainedModel,
    sites: list[FFNSite],
    method: "Method",
    data: Iterable[Batch],
    progress: Progress = iter,
) -> Iterator[Tensor]:
    """Give the order of each site's neurons that makes the method's experts contiguous. Nothing is changed.

    Args: as :func:`~lte.surgery.convert.sparsify_`; ``model`` may be sparse already, in mode dense.
    """
    activations = _record_neurons(model, sites, data) if method.needs_activations else []
    for labels_F, _site in zip(method.group(sites, activations), progress(sites), strict=True):
        yield grouping_permutation(labels_F)


def regroup_(
    model: PreTrainedModel,
    method: "Method",
    data: Iterable[Batch],
    progress: Progress = iter,
) -> dict[str, Tensor]:
    """Group the neurons of a sparse model in mode dense, by its current weights (LTE paper, section 4.1).

    All ranks take the order of the first rank. Return the order ``[F]`` of each FFN's neurons, by its name.

    Args:
        data: read only by a method that groups by activations.
        progress: wraps the iteration over FFNs.
    """
    sites = find_sites(model, model.config.model_type)
    orders: dict[str, Tensor] = {}
    if is_sharded(model):
        _regroup_parts_(model, sites, method, progress)
    else:
        for site, order in zip(sites, group(model, sites, method, data, progress), strict=True):
            orders[site.name] = broadcast(order.to(model.device))  # pyright: ignore[reportArgumentType]
            site.permute_neurons(orders[site.name])
    section_of(model.config).pop("grouped", None)
    return orders


def _regroup_parts_(model: PreTrainedModel, sites: list[FFNSite], method: "Method", progress: Progress) -> None:
    """Group one FFN after the other, so that no process has more than one whole FFN.

    Raises:
        ValueError: the method groups by activations.
    """
    if method.needs_activations:
        raise ValueError("parameters are sharded, so neurons are not grouped by activations: give grouping='kmeans'")
    for index, site in enumerate(progress(sites)):
        with whole(*site.projections().values()):
            (order,) = group(model, [site], replace(method, seed=method.seed + index), ())
            site.permute_neurons(order)  # the first process's result counts


def replace_ffn_(site: FFNSite, method: "Method") -> SparseFFN | SparseActivation:
    """Replace a dense FFN by a sparse one. Neurons must be in order. The router is not initialised."""
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


def _record_neurons(model: PreTrainedModel, sites: list[FFNSite], data: Iterable[Batch]) -> list[Tensor]:
    """Return the neurons of every FFN on up to 4096 tokens of ``data``: one ``[T, F]`` for each site.

    They are in bf16, which needs half of the memory and does not overflow.
    """
    return record_inputs(model, [(site.name, site.down, Tensor.bfloat16) for site in sites], data, RECORDED_TOKENS)
