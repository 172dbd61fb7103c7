"""``lte`` as a process of a sweep: it ends when the sweep does, however that ends."""

import ctypes
import os
import signal
import sys
import threading
import time

PARENT = "LTE_SWEEP"
"""The environment's variable that holds the sweep's process id."""
_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends; where it cannot, a thread looks every second."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if not _told_the_kernel():
        threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _told_the_kernel() -> bool:
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0


if __name__ == "__main__":
    end_with(int(os.environ[PARENT]))
    from lte.cli.main import main

    sys.exit(main())
