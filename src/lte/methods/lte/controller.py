"""Meeting a sparsity while scores are learned: the controller that moves eta in the soft stage."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SparsityController:
    """Moves eta, the weight of the efficiency loss, until measured sparsity follows a ramped target.

    Proportional and integral in log space, ``eta = eta_start * exp(gain * error + integral)``: the
    size of eta that a model needs spans orders of magnitude, and a factor is right at all of them.
    The target rises from 0 to ``target`` over the first ``ramp`` of the soft stage, fast at first and ever slower, as
    weights are pruned by Zhu and Gupta (2017, arXiv 1710.01878): the first experts cost nothing to close.

    Attributes:
        target: sparsity to reach, in (0, 1).
        integral: the controller's memory; saved with checkpoints. A tensor after the first step.
        gap: by how much text that is not trained on is sparser than text that is: ``target`` is meant for the former,
            and measured on the latter. A model uses more experts on what it has seen.
    """

    target: float
    eta_start: float = 0.3
    gain: float = 10.0
    integral_gain: float = 0.5
    ramp: float = 1 / 3
    integral: float | Tensor = 0.0
    gap: float | Tensor = 0.0

    def wanted(self, progress: float) -> float:
        """Target at a point of the soft stage, ``progress`` in [0, 1]."""
        return self.target * (1 - (1 - min(1.0, progress / self.ramp)) ** 3)

    def step(self, measured: float | Tensor, progress: float) -> Tensor:
        """Take one optimizer step's sparsity; give eta for the next, on the device of ``measured``.

        All of it stays there: a number read by Python would make every training step wait for the one before.
        """
        error = torch.as_tensor(self.wanted(progress) - self.gap - measured)
        self.integral = (self.integral + self.integral_gain * error).clamp(-7.0, 7.0)
        return self.eta_start * (self.gain * error + self.integral).clamp(-7.0, 7.0).exp()
