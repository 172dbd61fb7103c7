"""The stages of training and their length: dense (optional), soft, hard."""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["dense", "soft", "hard"]


@dataclass(frozen=True)
class StagePlan:
    """How many optimizer steps each stage takes.

    dense: fine-tune without routers. soft: model and routers together, experts scaled by score.
    hard: routers frozen, experts kept or dropped (LTE paper, section 4.2).
    """

    dense: int
    soft: int
    hard: int

    @staticmethod
    def split(total: int, dense_fraction: float, hard_fraction: float) -> "StagePlan":
        """Divide ``total`` steps; soft takes what dense and hard leave. A ``dense_fraction`` of 1 is a dense run.

        Raises:
            ValueError: fractions that leave the soft stage no step, or out of range.
        """
        dense, hard = round(total * dense_fraction), round(total * hard_fraction)
        if hard == 0 and hard_fraction > 0:
            hard = 1  # a run that asks for a hard stage ends in one, however short it is
        if dense_fraction == 1 and hard_fraction == 0:  # a dense baseline
            return StagePlan(total, 0, 0)
        if min(dense, hard) < 0 or dense + hard >= total:
            raise ValueError(
                f"{total} steps with dense_fraction {dense_fraction} and hard_fraction {hard_fraction} "
                "leave the soft stage none: make the fractions smaller, or train for more steps"
            )
        return StagePlan(dense, total - dense - hard, hard)

    @staticmethod
    def without_soft(total: int, dense_fraction: float) -> "StagePlan":
        """For routers that are not trained: hard takes what dense leaves.

        Raises:
            ValueError: a fraction that leaves the hard stage no step, or out of range.
        """
        dense = round(total * dense_fraction)
        if not 0 <= dense < total:
            raise ValueError(
                f"{total} steps with dense_fraction {dense_fraction} leave the hard stage none: make the fraction "
                "smaller, or train for more steps"
            )
        return StagePlan(dense, 0, total - dense)

    @property
    def total(self) -> int:
        return self.dense + self.soft + self.hard

    def begins_sparse(self, stage: Stage) -> bool:
        """Whether experts are used from this stage on: it is the first after the dense one, or the first of all."""
        return stage == "soft" or (stage == "hard" and not self.soft)

    def at(self, step: int) -> tuple[Stage, float]:
        """The stage that optimizer step ``step`` (from 0) belongs to, and how far it is through it, in [0, 1]."""
        if step < self.dense:
            return "dense", step / self.dense
        if step < self.dense + self.soft:
            return "soft", (step - self.dense) / self.soft
        return "hard", min(1.0, (step - self.dense - self.soft) / max(1, self.hard))
