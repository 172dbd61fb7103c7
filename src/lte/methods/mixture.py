"""What the trained mixtures of experts share: the model's own neurons in experts, as many of them for every token."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from lte.core.grouping import check_divisible
from lte.methods.experts import Grouped
from lte.methods.learned import LearnedTraining
from lte.methods.targeted import Targeted
from lte.modules.mixture import balance_loss, record_balance
from lte.modules.recording import Recording
from lte.surgery.sites import FFNSite
from lte.surgery.stages import Stage
from lte.surgery.training_options import TrainingOptions


@dataclass(frozen=True)
class Mixture(Grouped, Targeted):
    """Base of methods that train their routers (``lte.LTETrainer``); until then the function stays the same.

    Every token uses ``round((1 - target_sparsity) * E)`` of a layer's E experts. What it uses is scaled by weights
    above 0, in mode hard as well, so an expert is active where its weight is above tau, which is 0.

    Attributes:
        expert_size: neurons an expert; must divide d_ff.
        seed: of grouping and router initialisation.
        target_sparsity: fraction of neurons to leave idle, for every token in every layer.
        grouping: ``kmeans`` on the rows of the first FFN weight, ``coactivation`` from data, or ``random``.

    Raises:
        ValueError: an option outside its range.
    """

    tau: float = field(default=0.0, init=False)

    def check_site(self, site: FFNSite) -> None:
        self.num_active(check_divisible(site.d_ff, self.expert_size))

    def num_active(self, num_experts: int) -> int:
        """How many experts a token uses.

        Raises:
            ValueError: none, or all.
        """
        count = super().num_active(num_experts)
        if count == num_experts:
            raise ValueError(
                f"target_sparsity {self.target_sparsity} closes none of {num_experts} experts: ask for more, "
                "or for smaller experts"
            )
        return count

    def training(self, options: TrainingOptions) -> "MixtureTraining":
        return MixtureTraining(self, options)

    def router_shape(self, site: FFNSite) -> tuple[int, int, int]:
        """Width, number of experts, and how many of them a token uses."""
        num_experts = check_divisible(site.d_ff, self.expert_size)
        return site.d_model, num_experts, self.num_active(num_experts)


class MixtureTraining(LearnedTraining):
    """Training of a mixture's routers: their balance loss, while they learn."""

    @contextmanager
    def recording(self, stage: Stage) -> Iterator[Recording]:
        learning = self.layers if stage == "soft" else {}
        with super().recording(stage) as recording, record_balance(learning) as self._balance:
            yield recording

    def loss(self, stage: Stage, recording: Recording) -> Tensor:
        loss = super().loss(stage, recording)
        if not self._balance:
            return loss
        loss = balance_loss(self._balance, recording)
        self.log.note("balance_loss", loss)
        return loss


def check_weight(name: str, value: float) -> None:
    """Whether the weight of a loss is one.

    Raises:
        ValueError: it is negative.
    """
    if value < 0:
        raise ValueError(f"{name} is {value}, but the weight of a loss is at least 0")


def softmax_of(logits_TE: Tensor, chosen_TE: Tensor, total: float) -> Tensor:
    """Softmax over a token's chosen experts, times ``total``; 0 elsewhere."""
    return total * logits_TE.masked_fill(~chosen_TE, float("-inf")).softmax(-1)
