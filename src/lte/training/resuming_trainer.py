"""A ``Trainer`` whose run owns its folder and continues only from a checkpoint of the same run."""

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, cast

from transformers import Trainer

from lte.training.checkpoints import MEMORY
from lte.training.identity import model_identity, run_identity
from lte.training.lock import alone_in
from lte.training.optimizers import reading_states
from lte.training.resuming import agreed, begin_run


class ResumingTrainer(Trainer):
    """Writes the identity of a run at its start and compares it when the run is resumed.

    Attributes:
        identity: of the run, kept in each checkpoint.
    """

    args: Any
    calibration_dataset: Any
    identity: dict[str, Any]
    _model_identity: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        return Path(cast(str, self.args.output_dir))  # set by TrainingArguments if it was not given

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``. ``resume_from_checkpoint=True`` takes the newest complete checkpoint.

        Without such a checkpoint the run starts from its beginning. A finished run is loaded and not trained.

        Raises:
            ValueError: the checkpoint is damaged, or its run had another model, other data or other options. Or another
                run uses the output folder, or the folder has checkpoints and neither resume nor overwrite is given.
        """
        first = self.args.process_index == 0
        with ExitStack() as held:

            def begin() -> tuple[Path | None, dict[str, Any]]:
                held.enter_context(alone_in(self.folder))
                identity = self._identity()
                model = getattr(cast(Any, self.model).config, "_name_or_path", "")
                return begin_run(self.folder, identity, resume_from_checkpoint, self.args.overwrite, model), identity

            checkpoint, self.identity = agreed(first, begin)
            return self.train_from(checkpoint, *args, **kwargs)

    def train_from(self, checkpoint: Path | None, *args: Any, **kwargs: Any) -> Any:
        """Train from a checkpoint of this run, or from the beginning."""
        return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)

    def _identity(self) -> dict[str, Any]:
        """Return the identity that a checkpoint's run must have. The model is read before it is trained."""
        if self._model_identity is None:
            self._model_identity = model_identity(self.accelerator.unwrap_model(self.model))
        datasets = {"train_dataset": self.train_dataset, "calibration_dataset": self.calibration_dataset}
        if self.args.load_best_model_at_end:
            datasets["eval_dataset"] = self.eval_dataset
        return run_identity(self.args, self._model_identity, datasets, self.data_collator)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As ``Trainer``'s, which trains at least one step. A finished run trains no step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading_states(str(getattr(self.args.optim, "value", self.args.optim))) if checkpoint else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_callback_state(self) -> None:
        """As ``Trainer``'s, but not for our own callback. ``Trainer`` would make a new one without a trainer."""
        callbacks = cast(dict[str, Any], self.state.stateful_callbacks)
        ours = callbacks.pop(MEMORY, None)
        super()._load_callback_state()
        if ours is not None:
            callbacks[MEMORY] = ours
