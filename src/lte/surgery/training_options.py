"""The options of a run that ``transformers.TrainingArguments`` lacks: schedule, target, routers, distillation."""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING


@dataclass(frozen=True)
class Schedule:
    """The values of a schedule. The option with the name of a field overrides it."""

    hard_fraction: float
    separability_weight: float
    router_learning_rate: float | None
    router_weight_decay: float
    router_bias: float
    router_start: str
    temperature: float
    ramp: float
    restart_hard: bool
    distillation_weight: float
    feature_distillation_weight: float


SCHEDULES = {
    # the paper, literally: fixed eta, separability from the start, no bias, nothing else
    "paper": Schedule(
        hard_fraction=0.25,
        separability_weight=0.5,
        router_learning_rate=1e-2,
        router_weight_decay=0.1,
        router_bias=0.0,
        router_start="random",
        temperature=1.0,
        ramp=1.0,
        restart_hard=True,
        distillation_weight=0.0,
        feature_distillation_weight=0.0,
    ),
    "default": Schedule(
        hard_fraction=0.1,
        separability_weight=0.0,
        router_learning_rate=None,  # by the inputs of the FFNs
        router_weight_decay=0.0,
        router_bias=1.0,
        router_start="fitted",
        temperature=10.0,
        ramp=0.5,
        restart_hard=False,
        distillation_weight=0.9,
        feature_distillation_weight=0.0,
    ),
}
DENSE = "dense"
"""This name in place of a schedule means no routers: the dense baseline for sparse models of the same budget."""


def check_target(target_sparsity: float | None) -> None:
    """Raise ValueError unless the default schedule can meet this sparsity."""
    if target_sparsity is None or not 0 < target_sparsity < 1:
        raise ValueError(
            f"target_sparsity is {target_sparsity}, but the default schedule needs a fraction between 0 and 1, e.g. "
            "0.5 (or take schedule='paper' with eta)"
        )


@dataclass
class TrainingOptions:
    """The fields of :class:`~lte.training.arguments.LTETrainingArguments` that are not Hugging Face's."""

    schedule: str | None = field(
        default=None,
        metadata={
            "help": "default (if none is given): meets a target sparsity; paper: trains as the paper says; dense: a "
            "dense baseline."
        },
    )
    recipe: str | None = field(default=None, metadata={"help": "The former name of --schedule."})
    target_sparsity: float | None = field(
        default=None,
        metadata={"help": "Fraction of inactive neurons to reach, in (0, 1); default schedule."},
    )
    eta: float | None = field(
        default=None, metadata={"help": "Weight of the efficiency loss, 0 to 2 in the paper; paper schedule."}
    )
    dense_fraction: float = field(
        default=0.25,
        metadata={"help": "Share of the steps that fine-tune the dense model first; 0 to skip."},
    )
    hard_fraction: float | None = field(
        default=None, metadata={"help": "Share of the steps in the hard stage, at the end."}
    )
    separability_weight: float | None = field(default=None, metadata={"help": "Weight of the separability loss."})
    separability_floor: float = field(
        default=1e-4, metadata={"help": "Smallest divisor (score - tau)^2 of the separability loss."}
    )
    router_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of the routers (default: from the inputs of the FFNs; paper: 0.01)."},
    )
    router_weight_decay: float | None = field(default=None, metadata={"help": "Weight decay of the routers."})
    router_bias: float | None = field(
        default=None,
        metadata={
            "help": "Bias of the routers at the start of the soft stage (the mean bias of fitted ones); 0 freezes it."
        },
    )
    router_start: str | None = field(
        default=None,
        metadata={
            "help": "random, or fitted: fitted on training rows to what each expert contributes in the dense model."
        },
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Temperature of the sigmoid at the end of the soft stage; it starts at 1."}
    )
    ramp: float | None = field(
        default=None,
        metadata={"help": "Share of the soft stage in which the temperature grows; then it is constant. In (0, 1]."},
    )
    sparsity_ramp: float = field(
        default=1 / 3,
        metadata={"help": "Share of the soft stage in which the wanted sparsity grows to the target. In (0, 1]."},
    )
    dense_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of the dense stage (default: the learning rate, or half of it if that is not "
            "given either)."
        },
    )
    calibration_rows: int = field(
        default=64, metadata={"help": "Training rows (at most 5 %) that are kept out for thresholds; default schedule."}
    )
    restart_hard: bool | None = field(
        default=None,
        metadata={"help": "The hard stage has its own warm-up (paper); otherwise it continues the soft stage."},
    )
    distillation_weight: float | None = field(
        default=None, metadata={"help": "Share of the task loss that is KL to the dense model's outputs, in [0, 1]."}
    )
    feature_distillation_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the relative squared error of hidden states against the dense model's; 0 for none."
        },
    )

    if TYPE_CHECKING:
        seed: int = 42  # Hugging Face's

    @property
    def is_dense(self) -> bool:
        """Whether the run is a dense baseline, which reads only ``dense_learning_rate`` of these options."""
        return self.schedule == DENSE

    @property
    def distils(self) -> bool:
        """Whether the stages after the dense one learn from the model of the dense stage."""
        return bool(self.distillation_weight or self.feature_distillation_weight)

    def fill_in(self) -> None:
        """Set each option that is None to the schedule's value.

        Raises:
            ValueError: an unknown schedule, an option outside its range, or options that contradict each other.
        """
        if self.schedule and self.recipe:
            raise ValueError("schedule and recipe are two names of one option: give schedule alone")
        self.schedule, self.recipe = self.schedule or self.recipe or "default", None
        if self.schedule not in (*SCHEDULES, DENSE):
            raise ValueError(
                f"schedule is {self.schedule!r}, but it is one of {', '.join(sorted([*SCHEDULES, DENSE]))}"
            )
        if self.is_dense:
            self.dense_fraction, self.hard_fraction = 1.0, 0.0
            self.distillation_weight = self.feature_distillation_weight = 0.0
        schedule = SCHEDULES["default" if self.is_dense else self.schedule]
        for one in fields(Schedule):
            if getattr(self, one.name) is None:
                setattr(self, one.name, getattr(schedule, one.name))
        self._check_goal()
        if not self.separability_floor > 0:
            raise ValueError(f"separability_floor is {self.separability_floor}, but it must be > 0, e.g. 1e-4")
        if self.calibration_rows < 1:
            raise ValueError(f"calibration_rows is {self.calibration_rows}, but at least 1 is needed, e.g. 64")
        if not 0 <= self._get("distillation_weight") <= 1:
            raise ValueError(f"distillation_weight is {self.distillation_weight}, but it is a share in [0, 1]")
        if self._get("feature_distillation_weight") < 0:
            raise ValueError(f"feature_distillation_weight is {self.feature_distillation_weight}, but it is at least 0")
        if self.router_start not in ("random", "fitted"):
            raise ValueError(f"router_start is {self.router_start!r}, but it is random or fitted")
        if not 0 < self._get("ramp") <= 1:
            raise ValueError(f"ramp is {self.ramp}, but it is a share of the soft stage, above 0 and at most 1")
        if not 0 < self.sparsity_ramp <= 1:
            raise ValueError(
                f"sparsity_ramp is {self.sparsity_ramp}, but it is a share of the soft stage, above 0 and at most 1"
            )
        if self.dense_learning_rate is not None and not self.dense_learning_rate > 0:
            raise ValueError(f"dense_learning_rate is {self.dense_learning_rate}, but it is above 0, e.g. 3e-4")
        if self._get("temperature") < 1:
            raise ValueError(f"temperature is {self.temperature}, but it grows from 1, so it is at least 1")

    def _check_goal(self) -> None:
        if self.schedule == "default":
            if self.target_sparsity is not None:
                check_target(self.target_sparsity)
            if self.eta is not None:
                raise ValueError("eta is set, but the default schedule finds eta: drop eta, or take schedule='paper'")
        elif self.target_sparsity is not None:
            raise ValueError(
                f"target_sparsity is set, but schedule={self.schedule!r} has no target: drop it, or take the "
                "default schedule"
            )
        elif not self.is_dense and (self.eta is None or self.eta < 0):
            raise ValueError(f"eta is {self.eta}, but schedule='paper' needs an eta >= 0 (the paper: 0 to 2)")

    def _get(self, name: str) -> float:
        value = getattr(self, name)
        assert value is not None
        return value
