"""Commands of ``lte``, each in a process of its own that is forked from one that has imported everything.

Importing takes seconds and a tiny model's command a fraction of one: forking makes thousands of trials possible.
Run as a script, this file is the process that is forked from. It has one thread, so that a fork is safe: it imports,
and computes nothing.
"""

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

COMMANDS = ("train", "eval", "sparsify", "prune", "calibrate", "generate", "inspect", "report", "sweep")
IMPORTED = (
    *(f"lte.cli.{name}" for name in COMMANDS),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "bert")),
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.integrations.ggml",
    "transformers.trainer_pt_utils",
    "transformers.utils.chat_template_utils",
    "lte.ops.cpu",
    "lte.ops.cpu_step",
    "torch._dynamo",
    "matplotlib.pyplot",
    "pyarrow.parquet",
    "gguf",
    "rouge_score.rouge_scorer",
    "sacrebleu",
    "typeguard._checkers",
    "rich.status",
    "rich._emoji_codes",
)
MEMORY = 3 * 2**30
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")


@dataclass(frozen=True)
class Death:
    """How a process is to die: after so many seconds, or at its n-th operation on files.

    With ``size``, it is not this operation that kills, but the first write after it that makes a file so large.
    """

    seconds: float | None = None
    operation: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Ran:
    """What became of a command: its exit code, or the negative signal that ended it; hung: it had to be killed."""

    code: int
    out: str
    err: str
    seconds: float
    hung: bool = False
    operations: int = 0


class Commands:
    """Runs commands, one at a time. To be closed, as by ``with``."""

    def __init__(self) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONHASHSEED": "0",
            "TOKENIZERS_PARALLELISM": "false",
            "MPLBACKEND": "agg",
            "COLUMNS": "100",
        }
        environment.pop("TRITON_INTERPRET", None)
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self,
        argv: list[str],
        folder: Path,
        *,
        death: Death | None = None,
        largest: int | None = None,
        cpu_seconds: int = 60,
        seconds: float = 240.0,
    ) -> Ran:
        """Run ``lte`` with ``argv`` in a folder.

        Args:
            largest: bytes a file may have; writing more is an error, as on a full disk.
            cpu_seconds, seconds: after which the command hangs.
        """
        job = {"argv": argv, "folder": str(folder), "death": asdict(death or Death()), "largest": largest}
        job |= {"cpu_seconds": cpu_seconds, "seconds": seconds}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return Ran(**json.loads(self._server.stdout.readline()))

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._server.communicate()


def serve() -> None:
    import gc
    import importlib

    for name in IMPORTED:
        with contextlib.suppress(ImportError):  # an extra that is not installed, a module that another version lacks
            importlib.import_module(name)
    gc.freeze()
    jobs = os.fdopen(os.dup(0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in jobs:
        answers.write(json.dumps(asdict(_forked(json.loads(line), [jobs.fileno(), answers.fileno()]))) + "\n")
        answers.flush()
    os._exit(0)  # triton's libraries print pages when they are unloaded


def _forked(job: dict[str, Any], ours: list[int]) -> Ran:
    pipes = {name: os.pipe() for name in ("out", "err", "operations")}
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        for fd in [*ours, *(read for read, _ in pipes.values())]:
            os.close(fd)
        _child(job, {name: write for name, (_, write) in pipes.items()})
    for _, write in pipes.values():
        os.close(write)
    found, hung = _watch(pid, {read: name for name, (read, _) in pipes.items()}, began, job)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):  # what it has left running
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    texts = {name: found[name].decode(errors="replace") for name in ("out", "err")}
    return Ran(code, **texts, seconds=time.monotonic() - began, hung=hung, operations=len(found["operations"]))


def _watch(pid: int, reads: dict[int, str], began: float, job: dict[str, Any]) -> tuple[dict[str, bytearray], bool]:
    """Read what the process writes, until it ends; kill it in time."""
    found = {name: bytearray() for name in reads.values()}
    dies, ends = job["death"]["seconds"], job["seconds"]
    process = os.pidfd_open(pid)
    over = hung = False
    while not over:
        left = min(ends, ends if dies is None else dies) - (time.monotonic() - began)
        ready, _, _ = select.select([process, *reads], [], [], min(max(left, 0), 1e6))
        over = process in ready
        if not ready:
            hung = dies is None
            os.kill(pid, signal.SIGKILL)
            dies, ends = None, float("inf")
        for fd in [one for one in ready if one != process]:
            chunk = os.read(fd, 2**16)
            found[reads[fd]] += chunk
            if not chunk:
                os.close(fd)
                del reads[fd]
    for fd, name in reads.items():  # what it had written before it died
        os.set_blocking(fd, False)
        while True:
            try:
                chunk = os.read(fd, 2**16)
            except BlockingIOError:
                break
            if not chunk:
                break
            found[name] += chunk
        os.close(fd)
    os.close(process)
    return found, hung


def _child(job: dict[str, Any], writes: dict[str, int]) -> None:
    code = 1
    try:
        os.setsid()
        os.dup2(writes["out"], 1)
        os.dup2(writes["err"], 2)
        os.chdir(job["folder"])
        _limit(job)
        _count_operations(Death(**job["death"]), writes["operations"])
        from lte.cli.main import main

        code = main(job["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _limit(job: dict[str, Any]) -> None:
    held = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (job["cpu_seconds"], job["cpu_seconds"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if job["largest"] is not None:  # Python ignores SIGXFSZ: writing more fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"], job["largest"]))


def _count_operations(death: Death, report: int) -> None:
    """Report each operation on files as a byte, and die at the one asked for."""
    count = 0

    def operation() -> None:
        nonlocal count
        count += 1
        os.write(report, b".")
        if count != death.operation:
            return
        if death.size is None:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (death.size, death.size))

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event in WRITES or (event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            operation()

    synchronise = os.fsync
    os.fsync = lambda fd: (operation(), synchronise(fd))[1]
    sys.addaudithook(watch)


if __name__ == "__main__":
    serve()
