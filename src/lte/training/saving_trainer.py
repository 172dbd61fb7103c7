"""A ``Trainer`` whose models and checkpoints are complete. A failed save names its file and leaves nothing."""

import shutil
from pathlib import Path
from typing import Any, cast

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lte.files import writing
from lte.saving import saving
from lte.training.checkpoints import rotate, seal

PROVEN = 2
"""The least number of checkpoints that stay during training: the newest may come from a run that diverges."""


class SavingTrainer(Trainer):
    """Saves the model, its tokenizer and the arguments together, and removes a checkpoint that fails.

    Attributes:
        identity: of the run, kept in each checkpoint.

    Raises:
        NotWritten: a full disk, missing permissions and the like, on saving.
    """

    identity: dict[str, Any]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or cast(str, self.args.output_dir)
        if not self.args.should_save:
            super()._save(folder, state_dict)  # this rank helps to gather the weights and writes nothing
            return
        with saving(folder) as fresh:
            super()._save(str(fresh), state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """After all ranks have written, write the manifest. Then delete older checkpoints."""
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # damaged, so resuming skips it
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    seal(folder, self.identity)
        except OSError:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate(folder, limit and max(limit, PROVEN), self.state.best_model_checkpoint)
