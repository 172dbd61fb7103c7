"""Meeting a sparsity: the controller that moves eta in the soft stage, and the threshold in the hard stage."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SparsityController:
    """Moves eta, the weight of the efficiency loss, until measured sparsity follows a ramped target.

    Proportional and integral in log space, ``eta = eta_start * exp(gain * error + integral)``: the
    size of eta that a model needs spans orders of magnitude, and a factor is right at all of them.
    The target ramps from 0 to ``target`` over the first ``ramp`` of the soft stage.

    Attributes:
        target: sparsity to reach, in (0, 1).
        integral: the controller's memory; saved with checkpoints.
    """

    target: float
    eta_start: float = 0.3
    gain: float = 10.0
    integral_gain: float = 0.5
    ramp: float = 2 / 3
    integral: float = 0.0

    def wanted(self, progress: float) -> float:
        """Target at a point of the soft stage, ``progress`` in [0, 1]."""
        return self.target * min(1.0, progress / self.ramp)

    def step(self, measured: float, progress: float) -> float:
        """Take one optimizer step's sparsity; give eta for the next."""
        error = self.wanted(progress) - measured
        self.integral = min(7.0, max(-7.0, self.integral + self.integral_gain * error))
        return self.eta_start * math.exp(min(7.0, max(-7.0, self.gain * error + self.integral)))


def threshold_shift(scores: list[Tensor], masks: list[Tensor | None], target: float, tau: float) -> Tensor:
    """How far all logits lie too high for ``target`` of the scores to be at or below tau.

    Subtracting the result from every router's bias makes the sparsity of these very scores ``target``:
    the quantile of all layers' scores together, so layers keep their different sparsities.

    Args:
        scores: one ``[..., E]`` a layer; tokens are thinned out above a million scores.
        masks: which tokens count, one a layer.
        target: sparsity in (0, 1).
        tau: the threshold.

    Returns:
        Scalar, in units of the logit.
    """
    kept = [s.flatten(0, -2) if m is None else s[m.bool()] for s, m in zip(scores, masks, strict=True)]
    stride = max(1, sum(one.numel() for one in kept) // 1_000_000)
    values = torch.cat([one[::stride].flatten() for one in kept]).float()
    k = min(len(values), max(1, round(target * len(values))))
    quantile = values.kthvalue(k).values.clamp(1e-6, 1 - 1e-6)
    return quantile.logit() - math.log(tau / (1 - tau))
