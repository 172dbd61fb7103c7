"""Options that methods with experts share: how many neurons an expert has, and how they are found."""

from typing import Literal, get_args

from torch import Tensor

from lte.core.grouping import balanced_kmeans, check_divisible, coactivation_grouping, random_grouping
from lte.surgery.sites import Site

Grouping = Literal["kmeans", "coactivation", "random"]


def check_experts(expert_size: int, grouping: str) -> None:
    """Whether the options are in their range.

    Raises:
        ValueError: they are not.
    """
    if expert_size < 1:
        raise ValueError(f"expert_size is {expert_size}, but an expert has at least 1 neuron (usual: 32)")
    if grouping not in get_args(Grouping):
        raise ValueError(f"grouping is {grouping!r}, but it is one of {', '.join(get_args(Grouping))}")


def group_neurons(site: Site, grouping: Grouping, expert_size: int, activations_TF: Tensor | None, seed: int) -> Tensor:
    """Labels ``[F]``: the expert of each neuron.

    Raises:
        ValueError: ``expert_size`` does not divide d_ff.
    """
    num_experts = check_divisible(site.d_ff, expert_size)
    if grouping == "random":
        return random_grouping(site.d_ff, num_experts, seed)
    if grouping == "kmeans":
        return balanced_kmeans(site.feature_rows(), num_experts, seed)
    assert activations_TF is not None
    return coactivation_grouping(activations_TF.to(site.feature_rows().device), num_experts, seed)
