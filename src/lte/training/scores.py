"""What a training step takes from the scores of all layers: losses, and counts for the log."""

import torch
from torch import Tensor

from lte.core.accounting import count_active
from lte.core.losses import efficiency_loss, separability_loss
from lte.core.selection import threshold

NEAR_TAU = 0.1


def measure_scores(
    groups: list[tuple[float, Tensor, Tensor | None]], tau: float, floor: float
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Efficiency loss, separability loss and the share of scores near tau; and active experts, counted by layer.

    Args:
        groups: of layers that are alike: their share of all layers, scores ``[L, ..., E]``, mask.
        tau: an expert is active when its score is above it.
        floor: of the squared distance to tau that the separability loss divides by.
    """
    efficiency = separability = near = torch.zeros((), device=groups[0][1].device)
    counts = []
    for share, scores, mask in groups:
        efficiency = efficiency + share * efficiency_loss(scores, mask)
        separability = separability + share * separability_loss(scores, tau, floor, mask)
        scores = scores.detach()
        close_L, total = count_active(scores.sub(tau).abs() <= NEAR_TAU, mask)
        near = near + share * (close_L / total).mean()
        counts.append(count_active(threshold(scores, tau), mask))
    return efficiency, separability, near, counts
