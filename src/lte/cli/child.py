"""``lte`` as a process of a sweep. It always ends when the sweep ends."""

import ctypes
import os
import signal
import sys
import threading
import time

PARENT = "LTE_SWEEP"
"""The environment variable with the sweep's process id."""
_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends. If it cannot, a thread looks every second."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if not _told_the_kernel():
        threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:  # the parent has ended already
        os._exit(1)


def _told_the_kernel() -> bool:
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0


if __name__ == "__main__":
    end_with(int(os.environ[PARENT]))
    from lte.cli.main import main

    sys.exit(main())
