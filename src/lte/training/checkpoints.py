"""Finds the newest complete checkpoint: each of its files must be as it was written."""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lte.data.digest import digest_of_file
from lte.files import write_whole

logger = logging.getLogger(__name__)

MANIFEST = "lte_manifest.json"
"""The file with names, sizes and fingerprints of all files of a checkpoint. It is written last."""
RUN = "lte_run.json"
"""The file with the identity of a run, in its folder and in each checkpoint. Users may edit it: not in the manifest."""
MEMORY = "_Stages"
"""The key in a trainer's state for the values of LTETrainer."""


@dataclass(frozen=True)
class Flaw:
    """Why a checkpoint cannot be resumed.

    Attributes:
        text: the error and the file, as a sentence without its subject "it".
        damaged: whether the files differ from those that were written. Otherwise the checkpoint was saved without them.
    """

    text: str
    damaged: bool = True


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Return the folders of checkpoints, complete or not, the newest first."""
    steps = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(folder).glob("*")}
    found = {path: int(match[1]) for path, match in steps.items() if match and path.is_dir()}
    return sorted(found, key=found.__getitem__, reverse=True)


def newest_whole(folder: str | Path) -> Path | None:
    """Return the newest complete checkpoint in ``folder``; None if there is none. A warning names damaged ones.

    Raises:
        ValueError: there is none, but there is one that was saved without its optimizer.
    """
    flaws: dict[Path, Flaw] = {}
    for checkpoint in checkpoints_in(folder):
        flaw = flaw_of(checkpoint)
        if flaw is None:
            return checkpoint
        flaws[checkpoint] = flaw
        logger.warning("%s is passed over: it %s", checkpoint, flaw.text)
    for checkpoint, flaw in flaws.items():
        if not flaw.damaged:
            raise ValueError(_refused(checkpoint, flaw))
    return None


def check_whole(checkpoint: Path) -> None:
    """Raise ValueError unless the checkpoint exists and is complete."""
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is no folder of a checkpoint")
    if flaw := flaw_of(checkpoint):
        raise ValueError(_refused(checkpoint, flaw))


def _refused(checkpoint: Path, flaw: Flaw) -> str:
    cure = "resume from another one" if flaw.damaged else "train anew, from it as the model if need be"
    return f"{checkpoint} cannot be resumed: it {flaw.text}; {cure}"


def flaw_of(checkpoint: Path) -> Flaw | None:
    """Return what is wrong with a checkpoint; None if it is complete.

    An old checkpoint without a manifest counts as complete if its state, which was written last, is readable.
    """
    state = state_of(checkpoint)
    if state is None:
        return Flaw(f"has no readable {TRAINER_STATE_NAME}: it was cut off or damaged")
    memory = memory_of(state)
    if memory is None:
        return Flaw("was not written by LTETrainer", damaged=False)
    if memory.get("manifest"):
        try:
            listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
            written = {checkpoint / name: (one["bytes"], one["digest"]) for name, one in listed.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return Flaw(f"has no readable {MANIFEST}: it was cut off or damaged")
        for path, (size, _) in written.items():
            if not path.is_file():
                return Flaw(f"has no {path.name}, which was there when it was written")
            if (found := path.stat().st_size) != size:
                return Flaw(f"is damaged: {path.name} has {found} bytes of {size}")
        for path, (_, content) in written.items():
            if digest_of_file(path) != content:
                return Flaw(f"is damaged: {path.name} is not as it was written")
    if not any((checkpoint / name).exists() for name in (SCHEDULER_NAME, "latest")):  # DeepSpeed's own
        return Flaw(f"has no optimizer and no {SCHEDULER_NAME}: it was saved with save_only_model", damaged=False)
    return None


def state_of(checkpoint: Path) -> dict[str, Any] | None:
    """Return the trainer's state; None if it cannot be read."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("global_step"), int) else None


def memory_of(state: dict[str, Any]) -> dict[str, Any] | None:
    """Return LTETrainer's values in a trainer's state; None if another trainer wrote the state."""
    try:
        memory = state["stateful_callbacks"][MEMORY]["attributes"]
    except (KeyError, TypeError):
        return None
    return memory if isinstance(memory, dict) else None


def seal(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Write identity and manifest into a checkpoint. All its other files must be written already."""
    write_json(checkpoint / RUN, identity)
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "digest": digest_of_file(path)}
        for path in _files_in(checkpoint)
    }
    write_json(checkpoint / MANIFEST, {"files": files})


def _files_in(checkpoint: Path) -> Iterator[Path]:
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.relative_to(checkpoint).as_posix() not in (RUN, MANIFEST):
            yield path


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints until ``limit`` are left. ``newest`` and the best one stay."""
    others = [one for one in checkpoints_in(newest.parent) if one != newest and one != (best and Path(best))]
    present = len(checkpoints_in(newest.parent))
    while limit and present > limit and others:
        shutil.rmtree(others.pop(), ignore_errors=True)
        present -= 1


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is complete at any moment."""
    write_whole(path, json.dumps(content, indent=1))
