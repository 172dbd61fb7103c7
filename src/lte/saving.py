"""Saves a model into a folder, so that a kill of the process at any moment does no harm.

A folder holds the old model or the new one. In between it has no ``config.json``. Then nobody can load it, and
:func:`finish_saving` makes the new model complete.
"""

import errno
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lte.files import kept_folder, locked, new_path, sync, writing

_SAVED = ".lte-saved"
_WHOLE = ".whole"
"""A file in that folder which says that the new model is complete there and the old one must be removed."""
_HEADS = ("config.json", "adapter_config.json")
"""Without this file nobody loads the model, so the old one is removed first and the new one is moved last."""
_WEIGHTS = re.compile(
    r"(?:pytorch_)?model(?P<index>\.(?:safetensors|bin)\.index)?(?P<variant>\.[^.-]+)??(?:-\d{5}-of-\d{5})?"
    r"\.(?(index)json|(?:safetensors|bin))"
)
_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)


@contextmanager
def saving(folder: str | Path, unfinished: str | None = None) -> Iterator[Path]:
    """Give an empty folder to save a model to. Afterwards its files are moved into ``folder``.

    Files of the same name are replaced. Weights and tokenizer files of the old model are removed. All other files stay.
    A process that is killed meanwhile leaves the old model, the new one, or a folder without ``config.json``, of which
    :func:`finish_saving` makes the new one. If saving fails, ``folder`` is unchanged.

    The disk must have room for both models. Modes follow the umask.

    Args:
        folder: the folder of the model.
        unfinished: the name of a folder in it to save to. If saving is interrupted, that folder stays, and the next
            call gives it again. None begins with an empty folder each time.

    Raises:
        NotWritten: as :func:`writing`.
        ValueError: another process has the unfinished folder.
    """
    folder = Path(folder)
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with new_path(folder) if unfinished is None else kept_folder(folder / unfinished) as fresh:
                yield fresh
                mode = fresh.stat().st_mode & 0o666  # some libraries make files that only their owner can read
                for file in _files(fresh):
                    (fresh / file).chmod(mode)
                _move(fresh, folder)
        except BaseException:
            for one in made:
                if one.is_dir() and not any(one.iterdir()):
                    one.rmdir()
            raise


def finish_saving(folder: str | Path) -> None:
    """Finish the move of a model into its folder, if the process that saved it was killed meanwhile.

    Raises:
        ValueError: the folder cannot be written to.
    """
    saved = Path(folder) / _SAVED
    try:
        while saved.is_dir():
            with locked(saved) as held:  # the process that moves it may still be at work
                if held is not False:
                    _replace(saved)
    except OSError as error:
        raise ValueError(
            f"{folder}: saving this model was interrupted and cannot be finished here ({error.strerror}): "
            "load it once on a machine that can write to the folder, or save it again"
        ) from error


def _move(fresh: Path, folder: Path) -> None:
    """Make the model in ``fresh``, which this process holds, the model of the folder. It counts from the rename on."""
    (fresh / _WHOLE).touch()
    for path in (fresh, *fresh.rglob("*")):
        sync(path)
    while True:
        finish_saving(folder)
        try:
            fresh.rename(folder / _SAVED)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            break
    sync(folder)
    _replace(folder / _SAVED)


def _replace(saved: Path) -> None:
    """Remove the old model and move the new one in. The process may be killed after any step."""
    folder, whole = saved.parent, saved / _WHOLE
    if whole.exists():
        new = {*_files(saved)}
        for name in new.intersection(_HEADS):
            (folder / name).unlink(missing_ok=True)
        sync(folder)
        for name in _outdated((path.name for path in folder.iterdir() if path.is_file()), new):
            (folder / name).unlink()
        sync(folder)
        whole.unlink()
        sync(saved)
    for name in sorted(_files(saved), key=_HEADS.__contains__):
        if name in _HEADS:
            sync(folder)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).replace(folder / name)
    sync(folder)
    shutil.rmtree(saved)


def _outdated(names: Iterable[str], new: set[str]) -> list[str]:
    """Return the files of the old model that a loader would read together with the new ones."""
    weights = {match["variant"] for match in map(_WEIGHTS.fullmatch, new) if match}
    return [
        name
        for name in names
        if name not in new
        and (
            ((match := _WEIGHTS.fullmatch(name)) is not None and match["variant"] in weights)
            or (name in _TOKENIZER and "tokenizer_config.json" in new)
        )
    ]


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
