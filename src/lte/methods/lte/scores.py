"""The losses of an LTE training step from the scores of all layers, and the values for its log."""

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
    """Return LTE's efficiency and separability losses of a forward pass, without weights. The log gets both.

    Args:
        measure: :func:`measure_scores`, compiled or not.
    """
    stacked = recording.stacked()
    groups = [(len(names) / len(layers), scores, mask) for names, scores, mask in stacked]
    tau = next(iter(layers.values())).tau
    efficiency, separability, near, counts = measure(groups, tau, floor)
    for (names, _, _), count in zip(stacked, counts, strict=True):
        log.meter.add_counts(names, *count)
    for name, value in {"efficiency_loss": efficiency, "separability_loss": separability, "near_tau": near}.items():
        log.note(name, value.clone())  # the output of a CUDA graph is valid only in its step
    return efficiency, separability


def measure_scores(
    groups: list[tuple[float, Tensor, Tensor | None]], tau: float, floor: float
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Return efficiency loss, separability loss, the share of scores near tau, and active experts of each layer.

    Args:
        groups: for each group of similar layers its share of all layers, scores ``[L, ..., E]``, and mask.
        tau: an expert is active if its score is above tau.
        floor: the least divisor of the separability loss.
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
