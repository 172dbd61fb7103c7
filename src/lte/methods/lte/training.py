"""LTE's training (LTE paper, section 4): losses on scores, the temperature, and eta, which meets the target."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor

from lte.methods.learned import LearnedTraining
from lte.methods.lte.calibration import calibrate_, set_attention_cuts_
from lte.methods.lte.compensation_start import fit_compensations_
from lte.methods.lte.controller import SparsityController
from lte.methods.lte.scores import lte_losses, measure_scores
from lte.modules.evaluating import evaluating
from lte.modules.input_threshold import CUT, cut_layers
from lte.modules.recording import Recording, track_sparsity
from lte.modules.sharding import whole
from lte.surgery.activations import first_tokens
from lte.surgery.stages import Stage, StagePlan
from lte.surgery.training import Rows
from lte.surgery.training_options import check_target

_USUAL_SPARSITY = 0.5  # the sparsity for the start if there is no target
_COMPARISONS = 10  # comparisons in the soft stage of the sparsity of training rows with that of others
_CUT_TOKENS = 16_384  # for the thresholds on attention's inputs at the start of the hard stage
_APART = 20  # the least number of steps between two of them: a short stage has fewer


class LTETraining(LearnedTraining):
    """Training of LTE's routers.

    Attributes:
        eta: the weight of the efficiency loss: fixed, or moved by the controller after each step of the soft stage.
        controller: meets ``target_sparsity``.
    """

    def check(self) -> None:
        """Take the target of the options. The routers of a model can be trained for any target.

        Raises:
            ValueError: the default schedule without a target.
        """
        if self.options.schedule == "paper":
            self.method = replace(self.method, target_sparsity=None)
        elif not self.options.is_dense:
            asked = self.options.target_sparsity
            self.method = replace(self.method, target_sparsity=self.method.target_sparsity if asked is None else asked)
            check_target(self.method.target_sparsity)

    def begin(self, model: Any, plan: StagePlan, compiled: Callable[..., Any]) -> None:
        super().begin(model, plan, compiled)
        self._measure = compiled(measure_scores)

    def forget(self) -> None:
        super().forget()
        self.eta: float | Tensor = self.options.eta or 0.0
        self.controller = SparsityController(self.target or 0.0, ramp=self.options.sparsity_ramp)

    def enter(self, stage: Stage, rows: Rows) -> None:
        if stage == "hard":
            with whole(*self.added):
                for layer in self.layers.values():
                    layer.lte_router.fold_temperature()
        super().enter(stage, rows)
        if stage == "hard" and self.cuts:
            with rows.autocast():
                set_attention_cuts_(self.model, first_tokens(rows.training(), _CUT_TOKENS))
            self.share_cuts()

    def start_compensation(self, batches: Iterable[dict[str, Tensor]]) -> None:
        if any(layer.compensation is not None for layer in self.layers.values()):
            fit_compensations_(self.model, batches, self.target or _USUAL_SPARSITY)

    def before_step(self, stage: Stage, progress: float) -> None:
        """Raise the temperature in the first part of the soft stage."""
        if stage == "soft":
            ramped = min(1.0, progress / cast(float, self.options.ramp))
            temperatures = [layer.lte_router.temperature for layer in self.layers.values()]
            torch._foreach_zero_(temperatures)  # pyright: ignore  # few launches, not one a layer
            torch._foreach_add_(temperatures, cast(float, self.options.temperature) ** ramped)  # pyright: ignore

    def loss(self, stage: Stage, recording: Recording) -> Tensor:
        """Return ``eta`` times the efficiency loss plus the weighted separability loss; 0 in the hard stage."""
        floor = self.options.separability_floor
        efficiency, separability = lte_losses(recording, self.layers, floor, self.log, self._measure)
        if stage == "hard":
            return efficiency.new_zeros(())
        loss, weight = self.eta * efficiency, cast(float, self.options.separability_weight)
        return loss + weight * separability if weight else loss

    def after_step(self, stage: Stage, progress: float, step: int, sparsity: Tensor, rows: Rows) -> None:
        """Change eta by the controller."""
        if stage != "soft" or self.target is None:
            return
        if step % max(_APART, self.run_plan.soft // _COMPARISONS) == 0:
            self.compare(sparsity, rows)
        self.eta = self.controller.step(sparsity, progress)

    @torch.no_grad()
    def compare(self, sparsity: Tensor, rows: Rows) -> None:
        """Give the controller the sparsity of held-out rows minus that of the last step."""
        if rows.held_out is None:
            return
        with evaluating(self.model), rows.autocast(), track_sparsity(self.model) as meter:
            for batch in rows.held_out():
                self.model(**batch)
        self.controller.gap = cast(Tensor, reduce(meter.measured()[0], reduction="mean")) - sparsity

    def calibrate(self, rows: Rows) -> None:
        """Shift the thresholds on scores by the mean of the ranks' shifts. Those on inputs are the first rank's."""
        assert rows.held_out is not None
        assert self.target is not None
        routers = [layer.lte_router for layer in self.layers.values()]
        before = [router.bias.clone() for router in routers]
        with rows.autocast():
            shift = calibrate_(self.model, rows.held_out(), self.target)
        mean = cast(Tensor, reduce(torch.tensor(shift, device=PartialState().device), reduction="mean"))
        for router, bias in zip(routers, before, strict=True):
            router.bias.data.copy_(bias - mean / router.temperature)
        self.share_cuts()

    @property
    def cuts(self) -> list[Tensor]:
        """The thresholds on the inputs of attention's projections."""
        return [linear.get_buffer(CUT) for linear in cut_layers(self.model).values()]

    def share_cuts(self) -> None:
        """Copy the thresholds on inputs of the first rank to all ranks."""
        for cut in self.cuts:
            broadcast(cut)

    def state(self) -> dict[str, float]:
        return {
            "eta": float(self.eta),
            "integral": float(self.controller.integral),
            "gap": float(self.controller.gap),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.eta = state["eta"]
        self.controller.integral, self.controller.gap = state["integral"], state.get("gap", 0.0)

    def logged(self) -> dict[str, float]:
        return {"eta": float(self.eta)}
