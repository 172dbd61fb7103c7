"""``lte train --dry-run``: loads model and data, shows what the run will do and need, and trains nothing."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lte.cli.console import out, table
from lte.cli.progress import OnTerminal
from lte.training.estimate import Estimate, Times, estimate, time_steps


class DryRunEnds(Exception):
    """Ends a run before its training."""


class DryRun(OnTerminal):
    """Estimates a run in place of training.

    Args:
        time_it: whether a few steps of each stage are run and timed.

    Attributes:
        found: what the command prints as JSON.
    """

    def __init__(self, time_it: bool):
        self.time_it = time_it
        self.found: dict[str, Any] = {}

    def train(self, trainer: Any, resume: bool | str | None = None) -> None:
        """Show an estimate of the run.

        Raises:
            DryRunEnds: always.
        """
        folder, args = Path(trainer.folder), trainer.args
        made = estimate(trainer)
        when = f"every {args.save_steps:g} steps" if args.save_strategy == "steps" else f"each {args.save_strategy}"
        saves = "none" if args.save_strategy == "no" else f"{folder}/checkpoint-STEP, {when}"
        _show(made, str(folder), saves)
        rates = {"": args.learning_rate, "of the dense stage ": args.dense_learning_rate}
        rates |= {"of the routers ": None if args.is_dense else args.router_learning_rate}
        shown = ", ".join(f"{name}{rate:g}" for name, rate in rates.items() if rate is not None)
        out.print(f"learning rate: {shown}", markup=False)
        self.found = {"output": str(folder), "checkpoints": saves, **asdict(made), "peak_bytes": made.peak}
        if self.time_it:
            with self.waiting("timing a few steps of each stage"):
                times = time_steps(trainer, made.stages)
            _show_times(times)
            self.found |= {"seconds": asdict(times)}
        raise DryRunEnds


def _show(made: Estimate, folder: str, saves: str) -> None:
    stages = ", ".join(f"{name} {steps}" for name, steps in asdict(made.stages).items() if steps)
    out.print(f"steps: {stages}; {made.layers} FFNs of {made.experts} experts", markup=False)
    out.print(f"result: {folder}; checkpoints: {saves}", markup=False)
    rows = [[name, f"{count:,}", _gb(size)] for name, (count, size) in made.parameters.items()]
    table("parameters", ["", "number", "GB"], rows)
    table("memory, estimated", ["", "GB"], [[n, _gb(s)] for n, s in made.memory.items() if s])
    out.print(f"together {_gb(made.peak)} GB, without what libraries keep for themselves", markup=False)
    if made.unknown:
        out.print(f"the states of optim={made.unknown} are not known and are left out", markup=False)


def _show_times(times: Times) -> None:
    steps = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in times.step.items())
    out.print(f"a step: {steps}; stages begin in {times.begin:.3g} s", markup=False)
    out.print(f"all steps: {times.total / 3600:.2f} hours, without evaluations and saves", markup=False)
    if times.peak is not None:
        out.print(f"memory at the peak, measured: {_gb(times.peak)} GB", markup=False)


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g}"
