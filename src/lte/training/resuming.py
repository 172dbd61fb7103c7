"""How a run starts in its folder: from the beginning, or from a checkpoint of the same run."""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list

from lte.files import new_path
from lte.surgery.reading import read_json
from lte.training.checkpoints import (
    RUN,
    check_whole,
    checkpoints_in,
    memory_of,
    newest_whole,
    state_of,
    write_json,
)
from lte.training.distiller import KEPT_IN
from lte.training.identity import check_same

logger = logging.getLogger(__name__)

Told = TypeVar("Told")


def begin_run(
    folder: Path, identity: Mapping[str, Any], resume: str | Path | bool | None, overwrite: bool, model: str
) -> Path | None:
    """Return the checkpoint from which a run continues, or None. Write the run's identity into the folder.

    Args:
        folder: of the run's output.
        resume: a checkpoint, or True for the newest complete one in ``folder``. If there is none, a warning says so.
        overwrite: whether the checkpoints of an earlier run are deleted.
        model: the folder that the model was loaded from, or an empty text.

    Raises:
        ValueError: the checkpoint is damaged or of another run, or the folder has checkpoints and ``resume`` is false.
    """
    if resume and overwrite:
        raise ValueError("resume continues from a run's checkpoints, and overwrite deletes them: give one of the two")
    if resume is True:
        found = newest_whole(folder)
        if found is None:
            logger.warning("no whole checkpoint in %s: training starts from the beginning", folder)
    elif resume:
        check_whole(found := Path(resume))
    else:
        found = None
    if found is not None:
        _check_same_run(found, identity)
    if resume is not True and (found is None or found.resolve().parent != folder.resolve()):
        _clear(folder, overwrite, model)
    folder.mkdir(parents=True, exist_ok=True)
    if found is not None:
        _bring_teacher(found.parent / KEPT_IN, folder)
    write_json(folder / RUN, dict(identity))
    return found


def _check_same_run(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    state = state_of(checkpoint)
    assert state is not None  # complete
    if (checkpoint / RUN).exists():
        try:
            then = read_json(checkpoint / RUN)
        except ValueError as error:
            raise ValueError(f"{error}, or resume from another checkpoint") from error
    else:  # of an earlier version, which kept only a few options
        then = (memory_of(state) or {}).get("options", {})
        logger.warning(
            "%s has no %s: whether its run had the same model, data and options is checked only in part",
            checkpoint,
            RUN,
        )
    check_same(then, identity, str(checkpoint / RUN))
    if is_finished(state):
        logger.warning("the run is finished: all of its %d steps are done", state["max_steps"])


def is_finished(state: Mapping[str, Any]) -> bool:
    """Return whether a trainer's state is that of the end of a run."""
    return 0 < state.get("max_steps", 0) <= state["global_step"]


def _clear(folder: Path, overwrite: bool, model: str) -> None:
    """Delete the checkpoints of an earlier run if ``overwrite`` is true, so that this run never resumes from them."""
    left = checkpoints_in(folder)
    if not left:
        return
    if not overwrite:
        raise ValueError(
            f"{folder} holds checkpoints of a run ({left[0].name}): resume it, take another folder, or give overwrite "
            "to delete them"
        )
    if model and any(Path(model).resolve() == one.resolve() for one in left):
        raise ValueError(f"the model is {model}, which overwrite would delete: take another folder")
    (folder / RUN).unlink(missing_ok=True)
    for one in [*left, folder / KEPT_IN]:
        shutil.rmtree(one, ignore_errors=True)


def _bring_teacher(teacher: Path, folder: Path) -> None:
    """Copy the teacher of a run to the folder where it continues, so that it can be resumed from there again."""
    if teacher.is_dir() and teacher.parent.resolve() != folder.resolve():
        with new_path(folder) as fresh:
            shutil.copytree(teacher, fresh, dirs_exist_ok=True)
            shutil.rmtree(folder / KEPT_IN, ignore_errors=True)
            fresh.rename(folder / KEPT_IN)


def agreed(first: bool, work: Callable[[], Told]) -> Told:
    """Run ``work`` on the first rank. Return its result, or raise its error, on all ranks."""
    told: list[Any] = [None, None]
    failure: Exception | None = None
    if first:
        try:
            told[0] = work()
        except Exception as error:
            failure, told[1] = error, str(error)
    broadcast_object_list(told)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise ValueError(told[1])
    return told[0]
