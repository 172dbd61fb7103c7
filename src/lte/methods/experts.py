"""The common part of methods with experts: the size of an expert, and the grouping of neurons."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import torch
from torch import Tensor

from lte.core.grouping import (
    check_divisible,
    coactivation_gram,
    direction_gram,
    group_by_gram,
    random_grouping,
)
from lte.surgery.method import Method
from lte.surgery.sites import FFNSite

Grouping = Literal["kmeans", "coactivation", "random"]

_GRAMS = 2**29  # bytes of inner products that are grouped at once


@dataclass(frozen=True)
class Grouped(Method):
    """Base of methods that put neurons into experts. Of several bases it must be the first.

    Attributes:
        expert_size: neurons of an expert; must divide d_ff (paper: 32).
        seed: of grouping, and of all other random values.
        grouping: ``kmeans`` on the rows of the first FFN weight (paper), ``coactivation`` from data, or ``random``.

    Raises:
        ValueError: an option is outside its range.
    """

    grouping: Grouping = "kmeans"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_size < 1:
            raise ValueError(f"expert_size is {self.expert_size}, but an expert has at least 1 neuron (usual: 32)")
        if self.grouping not in get_args(Grouping):
            raise ValueError(f"grouping is {self.grouping!r}, but it is one of {', '.join(get_args(Grouping))}")

    @property
    def needs_activations(self) -> bool:
        return self.grouping == "coactivation"

    def group(self, sites: Sequence[FFNSite], activations: Sequence[Tensor]) -> Iterable[Tensor]:
        return group_neurons(sites, self.grouping, self.expert_size, activations, self.seed)


def group_neurons(
    sites: Sequence[FFNSite], grouping: Grouping, expert_size: int, activations: Sequence[Tensor], seed: int
) -> Iterator[Tensor]:
    """Give the labels ``[F]`` of each FFN: the expert of each neuron. FFN number ``i`` has the seed ``seed + i``.

    Raises:
        ValueError: ``expert_size`` does not divide d_ff.
    """
    num_experts = [check_divisible(site.d_ff, expert_size) for site in sites]
    if grouping == "random":
        yield from (random_grouping(sites[i].d_ff, num_experts[i], seed + i) for i in range(len(sites)))
        return
    for together in _alike(sites):
        if grouping == "kmeans":
            gram_LFF = torch.stack([direction_gram(sites[i].feature_rows()) for i in together])
        else:
            device = _device(sites[together[0]])
            gram_LFF = torch.stack([coactivation_gram(activations[i].to(device)) for i in together])
        yield from group_by_gram(gram_LFF, num_experts[together[0]], [seed + i for i in together])


def _alike(sites: Sequence[FFNSite]) -> Iterator[list[int]]:
    """Give the numbers of FFNs that are grouped at once: neighbours of one width and device, if memory allows.

    On a CPU they are grouped one by one: there, rounds of swaps wait for memory and not for launches.
    """
    for (d_ff, device), same in groupby(range(len(sites)), lambda i: (sites[i].d_ff, _device(sites[i]))):
        fit = 1 if device.type == "cpu" else max(1, _GRAMS // (4 * d_ff**2))
        numbers = list(same)
        yield from (numbers[i : i + fit] for i in range(0, len(numbers), fit))


def _device(site: FFNSite) -> torch.device:
    return site.feature_rows().device
