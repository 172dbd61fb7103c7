"""The common part of mixtures of experts: experts of the model's own neurons, the same number for every token."""

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
    """Base of mixtures, whose routers ``lte.LTETrainer`` trains. Until then the model's function stays the same.

    Every token uses ``round((1 - target_sparsity) * E)`` of a layer's E experts. They are scaled by weights above 0, in
    mode hard too. So an expert is active if its weight is above tau, which is 0.

    Attributes:
        expert_size: neurons of an expert; must divide d_ff.
        seed: of grouping and router initialisation.
        target_sparsity: fraction of idle neurons, for every token in every layer.
        grouping: ``kmeans`` on the rows of the first FFN weight, ``coactivation`` from data, or ``random``.

    Raises:
        ValueError: an option is outside its range.
    """

    tau: float = field(default=0.0, init=False)

    def check_site(self, site: FFNSite) -> None:
        self.num_active(check_divisible(site.d_ff, self.expert_size))

    def num_active(self, num_experts: int) -> int:
        """Return the number of experts that a token uses.

        Raises:
            ValueError: it would be 0 or all.
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
        """Return width, number of experts, and number of experts that a token uses."""
        num_experts = check_divisible(site.d_ff, self.expert_size)
        return site.d_model, num_experts, self.num_active(num_experts)


class MixtureTraining(LearnedTraining):
    """Training of a mixture's routers: it adds their balance loss while they learn."""

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
    """Raise ValueError unless the weight of a loss is at least 0."""
    if value < 0:
        raise ValueError(f"{name} is {value}, but the weight of a loss is at least 0")


def softmax_of(logits_TE: Tensor, chosen_TE: Tensor, total: float) -> Tensor:
    """Return the softmax over a token's chosen experts, times ``total``, and 0 for other experts, ``[..., E]``."""
    return total * logits_TE.masked_fill(~chosen_TE, float("-inf")).softmax(-1)
