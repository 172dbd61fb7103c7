"""A ``Trainer`` whose models and checkpoints are whole: what cannot be written is named, and leaves nothing behind."""

import shutil
from pathlib import Path
from typing import Any, cast

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lte.files import writing
from lte.saving import saving


class SavingTrainer(Trainer):
    """Saves the model, its tokenizer and the arguments at once, and takes back a checkpoint that fails.

    Raises:
        NotWritten: a full disk, missing permissions and the like, on saving.
    """

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or cast(str, self.args.output_dir)
        if not self.args.should_save:
            super()._save(folder, state_dict)  # takes part in gathering the weights, writes nothing
            return
        with saving(folder) as fresh:
            super()._save(str(fresh), state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
        except OSError:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise
