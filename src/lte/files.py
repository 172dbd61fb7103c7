"""Files that are complete at any moment. They are written under another name, flushed to the disk, then renamed.

A process that is killed leaves the old file or the new file, never a mixture. An incomplete file has a name that begins
with ``.lte-new``. The next write into that folder removes it.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NEW = ".lte-new-"
_FULL = "free some space there, or write to another place"
_FORBIDDEN = "write to another place, or change its permissions"
_CURES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: f"{_FULL} (ulimit -f says how large a file may be)",
    errno.EIO: "the disk may be damaged, write to another place",
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.ENOENT: "make its folder first",
    errno.ENOTDIR: "a part of its path is a file, give another path",
    errno.EEXIST: "there is a file of that name, give another one",
    errno.EISDIR: "there is a folder of that name, give another one",
    errno.ENAMETOOLONG: "give a shorter name",
}


class NotWritten(OSError):
    """A file or folder could not be written. The message says in one line which one, why, and what to do."""

    def __init__(self, path: str | Path, number: int) -> None:
        super().__init__(f"{path} could not be written ({os.strerror(number)}): {_CURES.get(number, _FULL)}")
        self.errno = number


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an error inside the context into NotWritten if the reason is that a file cannot be written.

    Raises:
        NotWritten: a full disk, a limit on the size of files, missing permissions and the like.
    """
    try:
        yield
    except Exception as error:
        number = _errno_of(error)
        if number is None:
            raise
        raise NotWritten(path, number) from error


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file; text is written as UTF-8. The old file stays until the new one is complete on the disk.

    Raises:
        NotWritten: as :func:`writing`.
    """
    with whole_file(path) as fresh:
        fresh.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a path with the same ending to write to. Afterwards that file replaces ``path``.

    A pipe or a device is written to directly. The new file has the mode of the old one, or that of the umask.

    Raises:
        NotWritten: as :func:`writing`.
    """
    real = Path(os.path.realpath(path))
    with writing(path):
        if real.exists() and not real.is_file():
            yield real
            return
        with new_path(real.parent, real.suffix) as fresh:
            mode = (real if real.exists() else fresh).stat().st_mode
            yield fresh
            fresh.chmod(mode & 0o777)
            sync(fresh)
            fresh.replace(real)
            sync(real.parent)


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a file, completely or not at all. Several processes may do this at the same time.

    Raises:
        NotWritten: as :func:`writing`.
    """
    real = Path(os.path.realpath(path))
    with writing(path):
        if real.exists() and not real.is_file():
            with real.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
            return
        while True:
            real.touch()
            with locked(real) as held:
                if held is False:
                    continue  # another process has replaced the file
                try:
                    before = real.read_bytes()
                    end = b"" if before.endswith(b"\n") or not before else b"\n"
                    write_whole(real, before + end + line.encode() + b"\n")
                except BaseException:
                    if not real.stat().st_size:
                        real.unlink()
                    raise
                return


@contextmanager
def new_path(folder: Path, suffix: str | None = None) -> Iterator[Path]:
    """Give a new file, or a new folder if there is no suffix. It is locked inside the context, then removed."""
    for path in folder.glob(f"{_NEW}*"):
        with locked(path, wait=False) as held:
            if held:
                _remove(path)
    while True:
        path = folder / f"{_NEW}{secrets.token_hex(4)}{suffix or ''}"
        if suffix is None:
            path.mkdir()
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        with locked(path) as held:
            if held is False:
                continue  # another process removed it before it was locked
            try:
                yield path
            finally:
                _remove(path)
            return


@contextmanager
def kept_folder(path: Path) -> Iterator[Path]:
    """Give a folder, new or with the work of a process that was interrupted. It stays, and is locked in the context.

    Bad input does not stay: a ValueError removes it.

    Raises:
        ValueError: another process has it.
    """
    path.mkdir(exist_ok=True)
    with locked(path, wait=False) as held:
        if held is False:
            raise ValueError(f"{path} is in use by another process: wait for its end")
        try:
            yield path
        except ValueError:
            _remove(path)
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool | None]:
    """Lock a file or folder against other processes. The lock ends with this process at the latest.

    Give True if it is locked. Give False if it no longer exists, or if another process holds it and ``wait`` is false.
    Give None if the disk has no locks.
    """
    if fcntl is None:
        yield None if path.exists() else False
        return
    try:
        opened = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = path.exists() and os.path.samestat(os.fstat(opened), path.stat())
        except BlockingIOError:
            held = False
        except OSError:
            held = None
        yield held
    finally:
        os.close(opened)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk, if the system can wait for it."""
    if fcntl is None and path.is_dir():
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _errno_of(error: Exception) -> int | None:
    """Return the error number if an error says that a file could not be written; else None.

    safetensors and tokenizers have Rust's form of message. ``torch.save`` only says that fewer bytes were written.
    """
    if isinstance(error, OSError):
        return error.errno if error.errno in _CURES else None
    if told := re.search(r"\(os error (\d+)\)", str(error)):
        return int(told[1])
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter|iostream error", str(error)):
        return errno.ENOSPC
    return None
