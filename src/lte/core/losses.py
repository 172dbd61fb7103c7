"""The two losses on router scores (LTE paper, section 4.1, equations 4 and 5).

Both take the scores of one router as ``[..., E]``, or those of several routers as a sequence of such tensors.
They average over experts, over tokens that are not padding, and over routers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Scores = Tensor | Sequence[Tensor]


def efficiency_loss(scores: Scores, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared score, ``1/(L E) sum G^2``. It pushes scores down, and large scores most.

    Args:
        scores: router scores in [0, 1], ``[..., E]``, or one such tensor for each layer.
        mask: which tokens count (non-zero), broadcastable to the leading shape of the scores,
            e.g. an attention mask ``[batch, sequence]``. None counts all.

    Returns:
        fp32 scalar; 0 when no token counts.
    """
    return _masked_mean(torch.square, scores, mask)


def separability_loss(scores: Scores, tau: float, floor: float, mask: Tensor | None = None) -> Tensor:
    """Return the mean of ``1 / (G - tau)^2``, an fp32 scalar. It pushes scores away from the threshold, up or down.

    The paper gives no bound at ``G = tau``, where the loss is infinite. ``floor`` is the smallest
    value of the denominator ``(G - tau)^2``. A score closer to tau than ``sqrt(floor)`` costs
    ``1 / floor`` and has no gradient.

    Args:
        scores, mask: as for :func:`efficiency_loss`.
        tau: the threshold of hard selection.
        floor: smallest denominator, > 0.

    Raises:
        ValueError: ``floor`` is not positive.
    """
    if not floor > 0:
        raise ValueError(f"floor is {floor}, but the separability loss needs a floor > 0, e.g. 1e-4")
    return _masked_mean(lambda g: 1 / torch.square(g - tau).clamp_min(floor), scores, mask)


def _masked_mean(of: Callable[[Tensor], Tensor], scores: Scores, mask: Tensor | None) -> Tensor:
    if not isinstance(scores, Tensor):
        if len(scores) == 0:
            raise ValueError("no scores: record them with lte.record_scores around the forward pass")
        return torch.stack([_masked_mean(of, one, mask) for one in scores]).mean()
    values_T = of(scores.float()).mean(-1)
    if mask is None:
        return values_T.mean()
    counted_T = mask.to(values_T.device).ne(0).expand_as(values_T)
    return values_T.where(counted_T, 0).sum() / counted_T.sum().clamp_min(1)
