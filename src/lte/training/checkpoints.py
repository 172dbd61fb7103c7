"""Which checkpoint of an interrupted run can be trusted."""

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint in ``output_dir`` that was written to its end; None if there is none.

    ``transformers.Trainer`` writes the trainer's state last, so a checkpoint whose state is readable
    is whole. One cut off by a kill is passed over.
    """
    steps = {
        state.parent: _global_step(state)
        for state in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    }
    return max((folder for folder, step in steps.items() if step >= 0), key=steps.__getitem__, default=None)


def _global_step(state: Path) -> int:
    try:
        step = json.loads(state.read_text())["global_step"]
    except (ValueError, KeyError, TypeError):
        return -1
    return step if isinstance(step, int) else -1
