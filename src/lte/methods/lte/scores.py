"""What a training step of LTE takes from the scores of all layers: losses, and what is logged of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lte.core.accounting import count_active
from lte.core.losses import efficiency_loss, separability_loss
from lte.core.selection import threshold
from lte.modules.recording import Recording
from lte.modules.sparse_ffn import Selecting
from lte.modules.step_log import StepLog

NEAR_TAU = 0.1


def lte_losses(
    recording: Recording, layers: dict[str, Selecting], floor: float, log: StepLog, measure: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """LTE's efficiency and separability losses of a forward pass, not weighted; both go to the log.

    Args:
        measure: :func:`measure_scores`, or it compiled.
    """
    stacked = recording.stacked()
    groups = [(len(names) / len(layers), scores, mask) for names, scores, mask in stacked]
    tau = next(iter(layers.values())).tau
    efficiency, separability, near, counts = measure(groups, tau, floor)
    for (names, _, _), count in zip(stacked, counts, strict=True):
        log.meter.add_counts(names, *count)
    for name, value in {"efficiency_loss": efficiency, "separability_loss": separability, "near_tau": near}.items():
        log.note(name, value.clone())  # what a CUDA graph put out does not outlive its step
    return efficiency, separability


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
        near = near + share * (close_L / total.clamp_min(1)).mean()
        counts.append(count_active(threshold(scores, tau), mask))
    return efficiency, separability, near, counts
