"""The stages of training and their length: dense (optional), soft, hard."""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["dense", "soft", "hard"]


@dataclass(frozen=True)
class StagePlan:
    """The number of optimizer steps of each stage.

    dense: fine-tuning without routers. soft: model and routers train together, and experts are scaled by their scores.
    hard: routers are frozen, and experts are kept or dropped (LTE paper, section 4.2).
    """

    dense: int
    soft: int
    hard: int

    @staticmethod
    def split(total: int, dense_fraction: float, hard_fraction: float) -> "StagePlan":
        """Divide ``total`` steps; the soft stage gets the others. A ``dense_fraction`` of 1 is a dense run.

        Raises:
            ValueError: a fraction is out of range, or the soft stage gets no step.
        """
        dense, hard = round(total * dense_fraction), round(total * hard_fraction)
        if hard == 0 and hard_fraction > 0:
            hard = 1  # a run with a hard stage ends in it, even if the run is short
        if dense_fraction == 1 and hard_fraction == 0:  # a dense baseline
            return StagePlan(total, 0, 0)
        if min(dense, hard) < 0 or dense + hard >= total:
            raise ValueError(
                f"{total} steps with dense_fraction {dense_fraction} and hard_fraction {hard_fraction} "
                "leave the soft stage no step: make the fractions smaller, or train for more steps"
            )
        return StagePlan(dense, total - dense - hard, hard)

    @staticmethod
    def without_soft(total: int, dense_fraction: float) -> "StagePlan":
        """Divide ``total`` steps for routers that are not trained. The hard stage gets the steps after the dense stage.

        Raises:
            ValueError: the fraction is out of range, or the hard stage gets no step.
        """
        dense = round(total * dense_fraction)
        if not 0 <= dense < total:
            raise ValueError(
                f"{total} steps with dense_fraction {dense_fraction} leave the hard stage no step: make the fraction "
                "smaller, or train for more steps"
            )
        return StagePlan(dense, 0, total - dense)

    @property
    def total(self) -> int:
        return self.dense + self.soft + self.hard

    def begins_sparse(self, stage: Stage) -> bool:
        """Return whether this stage is the first that uses experts."""
        return stage == "soft" or (stage == "hard" and not self.soft)

    def at(self, step: int) -> tuple[Stage, float]:
        """Return the stage of optimizer step ``step`` (from 0), and the progress through the stage, in [0, 1]."""
        if step < self.dense:
            return "dense", step / self.dense
        if step < self.dense + self.soft:
            return "soft", (step - self.dense) / self.soft
        return "hard", min(1.0, (step - self.dense - self.soft) / max(1, self.hard))
