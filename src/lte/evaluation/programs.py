"""Runs programs that a model wrote: each in a process of its own, with limits of time and memory, without network.

It stands in for the metric ``code_eval`` of the package `evaluate` (Chen et al., 2021, section 2), which is a script on
the hub and runs programs beside the model. A program can still read the user's files, and write small ones.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import comb
from tempfile import TemporaryDirectory
from typing import Any

logger = logging.getLogger(__name__)

_SECONDS = 3.0
_MEMORY = 2**31
_FILE = 2**20
_START = 10.0  # seconds for a process to start on a busy machine
_DONE = "all of it ran"

_RUN = f"""
import os, resource, signal, sys
program, told = sys.stdin.buffer.read().decode(), os.dup(1)
nothing = os.open(os.devnull, os.O_RDWR)
for stream in 0, 1, 2:
    os.dup2(nothing, stream)
for what, most in (("CPU", {int(_SECONDS) + 1}), ("AS", {_MEMORY}), ("FSIZE", {_FILE}), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
signal.setitimer(signal.ITIMER_REAL, {_SECONDS})
exec(compile(program, "program", "exec"), {{}})
os.write(told, {_DONE!r}.encode())
"""
_KEPT = ("PATH", "LD_LIBRARY_PATH")
_APART = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")


def runs(program: str) -> bool:
    """Return whether a Python program runs to its end without an exception.

    It has 3 seconds, 2 GiB of memory and files of 1 MiB. Its folder is empty and is deleted. It does not get the
    variables of the environment. Where a user may make namespaces (``unshare``), it has no network and leaves no
    process.
    """
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each thread reserves memory
    with TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*_apart(), sys.executable, "-I", "-c", _RUN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(program.encode(errors="replace"), _SECONDS + _START)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return False
    return said.decode() == _DONE


@cache
def _apart() -> tuple[str, ...]:
    """Return the command that runs another one without network; none, with a warning, if the system refuses it."""
    try:
        subprocess.run([*_APART, "true"], capture_output=True, check=True, timeout=_START)
    except (OSError, subprocess.SubprocessError):
        logger.warning("programs that the model wrote can use the network: `unshare` makes no namespaces here")
        return ()
    return _APART


class CodeEval:
    """Runs programs with their tests, as the metric ``code_eval`` does."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """Return pass@k over all problems, and for each problem which of its programs passed.

        Args:
            references: the tests of each problem.
            predictions: some programs for each problem.
            k: pass@k is the chance that one of k programs passes. It is left out where a problem has fewer.
        """
        jobs = [(i, f"{one}\n{references[i]}") for i, several in enumerate(predictions) for one in several]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(runs, (program for _, program in jobs)))
        passed: dict[int, list[bool]] = {i: [] for i in range(len(predictions))}
        for (i, _program), one in zip(jobs, done, strict=True):
            passed[i].append(one)
        fewest = min(map(len, passed.values()))
        return {f"pass@{one}": _chance(passed, one) for one in k if one <= fewest}, passed


def _chance(passed: dict[int, list[bool]], k: int) -> float:
    """Return the unbiased estimate of pass@k (Chen et al., 2021, equation 1)."""
    none = (comb(len(one) - sum(one), k) / comb(len(one), k) for one in passed.values())
    return sum(1 - one for one in none) / len(passed)
