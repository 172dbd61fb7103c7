"""Processes that end where they should not, and disks that are full."""

import os
import signal

STEPS = ("open", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "write")
"""Calls of the system at which a process may end."""


def killed_at(step, act):
    """Whether a child that does ``act`` was killed, before its call number ``step`` of the system."""
    child = os.fork()
    if child == 0:
        left = step
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

        def counted(call):
            def dies(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return dies

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def each_kill(act, prepare):
    """Prepare, let a child that does ``act`` be killed a step later each time; stop when it lives."""
    for step in range(1000):
        prepare()
        if not killed_at(step, act):
            assert step > 3, "nothing was counted"
            return
        yield step
    raise AssertionError("it never lives")


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def failing(number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    return fails
