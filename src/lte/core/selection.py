"""Selectors: they turn router scores into the weight of each expert.

Shape suffixes throughout: T tokens (any leading shape), D model width, F neurons, E experts,
N neurons an expert (F = E * N).
"""

import torch
from torch import Tensor


def threshold(scores_TE: Tensor, tau: float) -> Tensor:
    """Hard selection: return True where an expert is active, ``score > tau`` (LTE paper, section 4.2).

    Args:
        scores_TE: router scores in [0, 1], any leading shape.
        tau: the threshold.

    Returns:
        Boolean tensor of the same shape. A NaN score is inactive.
    """
    return scores_TE > tau


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Return True for the ``k`` highest scores of each token, ``[..., E]``. Of equal scores the lower index wins.

    Raises:
        ValueError: ``k`` is not between 0 and the number of experts.
    """
    num_experts = scores_TE.shape[-1]
    if not 0 <= k <= num_experts:
        raise ValueError(f"k is {k}, but it must lie between 0 and the {num_experts} experts")
    order = scores_TE.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(-1, order[..., :k], True)


def expert_norms(hidden_TF: Tensor, num_experts: int) -> Tensor:
    """Return the L2 length of each expert's neurons, ``[..., E]`` in fp32. Experts are contiguous."""
    return hidden_TF.unflatten(-1, (num_experts, -1)).float().norm(dim=-1)


def scale_experts(hidden_TF: Tensor, weight_TE: Tensor) -> Tensor:
    """Return every neuron times its expert's weight: a score (soft) or a 0/1 mask (hard).

    Args:
        hidden_TF: neurons after the activation, experts contiguous.
        weight_TE: one factor for each expert, cast to ``hidden_TF``'s dtype.
    """
    num_experts = weight_TE.shape[-1]
    hidden_TEN = hidden_TF.unflatten(-1, (num_experts, hidden_TF.shape[-1] // num_experts))
    return (hidden_TEN * weight_TE.to(hidden_TF.dtype).unsqueeze(-1)).flatten(-2)
