"""One run at a time in a folder. The kernel holds the lock, so it ends with its process in every case."""

import contextlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK = ".lte-lock"
_HELD: set[tuple[int, Path]] = set()
"""Folders that this process holds. Closing any handle of a lock's file loses the lock, so it is opened once."""


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Lock a folder. If it does not exist, it is made, and deleted again if it stays empty.

    The same process may lock it several times.

    The lock is that of ``lockf``, not of ``flock``. Children made by fork, such as a loader's workers, do not inherit
    it, and it works over NFS too. If the file system has no locks, a warning says so.

    Raises:
        ValueError: another process holds it.
    """
    folder = Path(folder)
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    key = os.getpid(), folder.resolve()
    if key in _HELD:
        yield
        return
    path = key[1] / LOCK
    file = _opened(path)
    try:
        if file is not None:
            _HELD.add(key)
            _sign(file)
        yield
    finally:
        if file is not None:
            _HELD.discard(key)
            path.unlink(missing_ok=True)
            os.close(file)
        with contextlib.suppress(OSError):  # not empty
            for one in made:
                one.rmdir()


def _opened(path: Path) -> int | None:
    """Return the locked file; None if the file system has no locks."""
    if fcntl is None:
        logger.warning("%s cannot be locked on this system: do not start a second run in it", path.parent)
        return None
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = _holder(file)
            os.close(file)
            raise ValueError(
                f"{path.parent} is in use by {holder}: wait until it ends, or take another folder"
            ) from None
        except OSError as error:
            os.close(file)
            logger.warning("%s cannot be locked (%s): do not start a second run in it", path.parent, error.strerror)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)  # the previous holder deleted it meanwhile


def _sign(file: int) -> None:
    """Write into the lock's file which process holds it."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": command[:200]})
    os.ftruncate(file, 0)
    os.pwrite(file, text.encode(), 0)


def _holder(file: int) -> str:
    try:
        found = json.loads(os.pread(file, 4096, 0))
        return "process {pid} on {host} since {since} ({command})".format(**found)
    except (ValueError, KeyError, TypeError):
        return "another process"
