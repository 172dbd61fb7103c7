"""A ``Trainer`` of a model with adapters: it saves and resumes them, and the frozen weights are in no checkpoint."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

from transformers import Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from lte.surgery.adapter_folder import load_adapters, save_adapters
from lte.surgery.adapters import Adapters


class AdaptingTrainer(Trainer):
    """Trains adapters if it has some.

    Attributes:
        adapters: None if all weights are trained.
    """

    args: Any
    adapters: Adapters | None = None

    def aside(self) -> AbstractContextManager[None]:
        """Return a context in which the model has its own structure, without adapters."""
        return nullcontext() if self.adapters is None else self.adapters.aside()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        adapters = self.adapters
        if adapters is None or (adapters.finished and not self.args.save_adapter):
            super()._save(output_dir, state_dict)
            return
        with self.aside():
            super()._save(output_dir, state_dict={})  # all files except the weights
        if self.args.should_save:
            folder = Path(output_dir or cast(str, self.args.output_dir))
            (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
            save_adapters(adapters, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.adapters is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapters(self.adapters, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.adapters is None:
            super()._load_best_model()
        else:
            load_adapters(self.adapters, Path(cast(str, self.state.best_model_checkpoint)))
