"""Progress of a training run: a bar on a terminal, a line at each logging step elsewhere."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lte.cli.console import err, track
from lte.training.run import Watcher


class OnTerminal(Watcher):
    """Shows bars and lines on stderr in place of the trainer's own."""

    def waiting(self, what: str) -> AbstractContextManager[Any]:
        return err.status(what)

    def track(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        return track(items, what)

    def train(self, trainer: Trainer, resume: bool | str | None = None) -> None:
        """Call ``trainer.train()``.

        Raises:
            KeyboardInterrupt: the message says from which checkpoint the run can continue.
        """
        progress = TrainingProgress()
        trainer.add_callback(progress)
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        try:
            with progress:
                trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            at = f"interrupted at step {trainer.state.global_step} of {trainer.state.max_steps}"
            if progress.saved:
                raise KeyboardInterrupt(f"{at}: --resume continues from step {progress.saved}") from None
            raise KeyboardInterrupt(f"{at}, before its first checkpoint: it must start again") from None


class TrainingProgress(TrainerCallback):
    """Shows step, loss, sparsity and eta. Use as a context manager around ``train()``."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=err, disable=not err.is_terminal)
        self._task = self._bar.add_task("training", total=None)
        self.saved = 0  # the step of the last checkpoint

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.saved = state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(self._task, completed=state.global_step, total=state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if not state.is_world_process_zero or "loss" not in logs:
            return
        line = f"loss {logs.get('task_loss', logs['loss']):.3f}"
        if "sparsity" in logs:
            line += f"  sparsity {logs['sparsity']:.1%}"
        if "eta" in logs:
            line += f"  eta {logs['eta']:.3g}"
        if err.is_terminal:
            self._bar.update(self._task, description=line)
        else:
            err.print(f"step {state.global_step}/{state.max_steps}  {line}")
