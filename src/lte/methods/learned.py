"""The common part of methods whose routers are trained: a soft stage, and the start of routers."""

from collections.abc import Iterable
from typing import cast

from torch import Tensor

from lte.methods.router_start import fit_routers_
from lte.surgery.convert import set_mode_
from lte.surgery.stages import StagePlan
from lte.surgery.training import Rows, Training


class LearnedTraining(Training):
    """Training of routers in a soft stage. They start at random, or fitted to what each expert contributes."""

    @property
    def needs_whole_model(self) -> bool:
        return False

    def plan(self, total: int) -> StagePlan:
        return StagePlan.split(total, self.options.dense_fraction, cast(float, self.options.hard_fraction))

    def start(self, rows: Rows) -> None:
        bias = cast(float, self.options.router_bias)
        self.draw(bias)
        if self.options.router_start != "fitted":
            return
        set_mode_(self.model, "dense")
        seen: list[dict[str, Tensor]] = []
        fit_routers_(self.model, (seen.append(batch) or batch for batch in rows.training()), bias)
        self.start_compensation(seen)
        self.share()

    def start_compensation(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """Called after routers were fitted, with the batches of that fit."""

    def trains(self, name: str) -> bool:
        return self.options.router_bias != 0 or not name.endswith("bias")
