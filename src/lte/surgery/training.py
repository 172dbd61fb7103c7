"""`Training`: a method's work while its model is trained. ``LTETrainer`` calls only this interface."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor, nn

from lte.modules.recording import Recording, record_scores, sparse_layers
from lte.modules.sharding import whole
from lte.modules.sparse_ffn import Selecting
from lte.modules.step_log import StepLog
from lte.surgery.activations import first_tokens
from lte.surgery.convert import set_mode_
from lte.surgery.stages import Stage, StagePlan
from lte.surgery.training_options import TrainingOptions

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """Batches outside of the training loop. Each call gives them from the start.

    Attributes:
        training: training rows, in their own order.
        held_out: held-out rows; None if there are none.
        autocast: the precision in which the run computes.
    """

    training: Callable[[], Iterator[Batch]]
    held_out: Callable[[], Iterator[Batch]] | None
    autocast: Callable[[], AbstractContextManager[Any]]


class Training:
    """Training with one method. This base class is for methods whose routers are set by ``method.fit`` and not trained.

    A run calls :meth:`plan` and :meth:`begin`. At the start of each stage it calls :meth:`enter`. If it is resumed
    inside a stage, it calls :meth:`load` and :meth:`set_stage` instead. In each step of the soft and the hard stage it
    calls :meth:`before_step`, :meth:`recording` with :meth:`loss`, and :meth:`after_step`. All ranks end with the same
    model.

    Args:
        method: of the model.
        options: of the run.
    """

    def __init__(self, method: Any, options: TrainingOptions) -> None:
        self.method, self.options = method, options
        self.check()
        self.forget()

    def check(self) -> None:
        """Raise ValueError unless the options fit the method: its own target, and not LTE's schedule ``paper``."""
        if self.options.schedule == "paper":
            raise ValueError(
                f"schedule='paper' trains LTE's routers, not those of {self.method.name}: take the default schedule"
            )
        made_for, asked = self.target, self.options.target_sparsity
        if asked not in (None, made_for):
            raise ValueError(
                f"the model was made for target_sparsity {made_for}, but the arguments ask for {asked}: "
                "make them equal, or convert the dense model again"
            )

    @property
    def target(self) -> float | None:
        """The target sparsity of the run; None if it has no target."""
        return None if self.options.is_dense else self.method.target_sparsity

    @property
    def needs_whole_model(self) -> bool:
        """Whether :meth:`enter` needs the whole model at once, which no rank has if parameters are sharded."""
        return True

    def plan(self, total: int) -> StagePlan:
        """Return the stages of a run of ``total`` steps.

        Raises:
            ValueError: too few steps.
        """
        return StagePlan.without_soft(total, self.options.dense_fraction)

    def begin(self, model: Any, plan: StagePlan, compiled: Callable[..., Any]) -> None:
        """Called when a run begins. The same object may serve several runs.

        Args:
            model: the sparse model, without wrappers of training.
            plan: of the run.
            compiled: compiles a function of tensors if the run compiles.
        """
        self.model, self.run_plan = model, plan
        self.layers: dict[str, Selecting] = sparse_layers(model)
        self.forget()

    def forget(self) -> None:
        """Go back to the state before the first step."""
        self.log = StepLog()

    def enter(self, stage: Stage, rows: Rows) -> None:
        """Change the model for a stage that begins."""
        if self.run_plan.begins_sparse(stage):
            self.start(rows)
        self.set_stage(stage)

    def start(self, rows: Rows) -> None:
        """Set the routers for the first stage after the dense one. Neurons are grouped already."""
        self.draw()
        set_mode_(self.model, "dense")
        for layer in self.layers.values():
            layer.router.requires_grad_(True)  # a method may train them outside of the training loop
        self.method.fit(self.model, first_tokens(rows.training(), self.method.fit_tokens))
        self.share()

    def draw(self, bias: float = 0.0) -> None:
        """Draw routers and compensations at random, by the run's seed."""
        generator = torch.Generator().manual_seed(self.options.seed)
        with whole(*self.added):
            for layer in self.layers.values():
                layer.reset(generator, bias)

    @property
    def added(self) -> list[nn.Module]:
        """The routers and compensations."""
        parts = [part for layer in self.layers.values() for part in (layer.router, layer.compensation)]
        return [part for part in parts if part is not None]

    def set_stage(self, stage: Stage) -> None:
        """Set the mode of a stage. The soft stage trains the routers, and soft and hard stage the compensation."""
        set_mode_(self.model, stage)
        for layer in self.layers.values():
            for name, parameter in layer.router.named_parameters():
                parameter.requires_grad_(stage == "soft" and self.trains(name))
            if layer.compensation is not None:
                layer.compensation.requires_grad_(stage != "dense")

    def trains(self, name: str) -> bool:
        """Return whether the soft stage trains this parameter of a router."""
        return False

    def before_step(self, stage: Stage, progress: float) -> None:
        """Called before each optimizer step; ``progress`` through its stage is in [0, 1]."""

    @contextmanager
    def recording(self, stage: Stage) -> Iterator[Recording]:
        """Record the forward pass of a step in the soft or the hard stage."""
        with record_scores(self.model) as recording:
            yield recording

    def loss(self, stage: Stage, recording: Recording) -> Tensor:
        """Return the loss that is added to the task loss, a scalar. The log gets the sparsity."""
        self.log.meter.add(self.layers, recording.stacked())
        return torch.zeros((), device=PartialState().device)

    def after_step(self, stage: Stage, progress: float, step: int, sparsity: Tensor, rows: Rows) -> None:
        """Called after each optimizer step of the soft and hard stage.

        Args:
            step: the number of steps that the run has done.
            sparsity: of this step.
        """

    def calibrate(self, rows: Rows) -> None:
        """Set thresholds on held-out rows, so that these have the target sparsity."""
        assert rows.held_out is not None
        with rows.autocast():
            self.method.calibrate(self.model, list(rows.held_out()))
        self.share()

    def share(self) -> None:
        """Copy routers and compensations of the first rank to all ranks."""
        with whole(*self.added):
            for part in self.added:
                broadcast(part.state_dict())

    def state(self) -> dict[str, float]:
        """Return the values that a checkpoint must keep."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from the result of :meth:`state`."""

    def logged(self) -> dict[str, float]:
        """Return the values for each entry of the log."""
        return {}
