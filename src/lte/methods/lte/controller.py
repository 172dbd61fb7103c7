"""The controller that changes eta in the soft stage, so that the sparsity meets its target."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SparsityController:
    """Changes eta, the weight of the efficiency loss, so that the measured sparsity follows a rising target.

    It is proportional and integral in log space, ``eta = eta_start * exp(gain * error + integral)``, because the eta
    that a model needs differs by orders of magnitude. The target rises from 0 to ``target`` over the first ``ramp`` of
    the soft stage, fast at first and then more slowly, as in Zhu and Gupta's pruning (2017, arXiv 1710.01878): the
    first experts cost nothing to close.

    Attributes:
        target: sparsity to reach, in (0, 1).
        integral: the controller's memory, which checkpoints keep. A tensor after the first step.
        gap: the sparsity on new text minus that on training text. ``target`` is meant for new text and measured on
            training text. A model uses more experts on text that it has seen.
    """

    target: float
    eta_start: float = 0.3
    gain: float = 10.0
    integral_gain: float = 0.5
    ramp: float = 1 / 3
    integral: float | Tensor = 0.0
    gap: float | Tensor = 0.0

    def wanted(self, progress: float) -> float:
        """Return the target at a point of the soft stage, ``progress`` in [0, 1]."""
        return self.target * (1 - (1 - min(1.0, progress / self.ramp)) ** 3)

    def step(self, measured: float | Tensor, progress: float) -> Tensor:
        """Take the sparsity of one optimizer step. Return eta for the next one, on the device of ``measured``.

        All values stay on the device: if Python reads a number, every training step waits for the previous one.
        """
        error = torch.as_tensor(self.wanted(progress) - self.gap - measured)
        self.integral = (self.integral + self.integral_gain * error).clamp(-7.0, 7.0)
        return self.eta_start * (self.gain * error + self.integral).clamp(-7.0, 7.0).exp()
