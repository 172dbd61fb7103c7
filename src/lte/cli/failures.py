"""The messages of a command that fails: one line, or a traceback with a request to report it."""

import importlib.metadata
import os
import platform
import select
import sys
import traceback

from lte.argument_error import ArgumentError

BAD_INPUT, BUG, INTERRUPTED, CLOSED = 2, 1, 130, 141
"""Exit codes. The last two are those of a shell for a process that SIGINT or SIGPIPE ended."""

_LOWER = {
    "train": "--per-device-train-batch-size (and raise --gradient-accumulation-steps), --sequence-length, or give "
    "--gradient-checkpointing",
    "bench": "--batch, --tokens or --sequence-length, or take a smaller --shape",
    "generate": "--batch-size or --max-new-tokens, or give --dtype bfloat16",
    "eval": "--batch-size or --sequence-length, or give --dtype bfloat16",
    "calibrate": "--batch-size or --sequence-length",
}

_OPTIONS = {"data": "text", "eval_data": "eval_text", "calibration_data": "calibration_text"}
"""The options of commands that are not called as the parameters in Python are."""


class UsageError(Exception):
    """The options cannot be parsed."""


def one_line(text: str) -> str:
    """Return the text on one line, without control characters of a terminal."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in " ".join(text.split()))


def explain(error: BaseException, command: str) -> int:
    """Write the reason for the end of a command to stderr and return its exit code. Our mistakes show a traceback."""
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        return CLOSED
    if isinstance(error, KeyboardInterrupt):
        return _say(str(error) or "interrupted", INTERRUPTED)
    if os.environ.get("LTE_DEBUG"):
        traceback.print_exception(error)
    if _is_out_of_memory(error):
        lower = _LOWER.get(command, "--sequence-length, or take a smaller model or a machine with more")
        return _say(f"out of memory ({_first_line(error)}): lower {lower}", BAD_INPUT)
    if isinstance(error, ArgumentError):
        return _say(error.as_options(_OPTIONS), BAD_INPUT)
    if isinstance(error, ValueError | OSError | ImportError | UsageError):
        return _say(str(error) or type(error).__name__, BAD_INPUT)
    if not os.environ.get("LTE_DEBUG"):
        traceback.print_exception(error)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("lte", "torch", "transformers"))
    return _say(
        f"{type(error).__name__}: {_first_line(error)}: this is a mistake in lte, please report it with the traceback "
        f"above ({versions}, Python {platform.python_version()}, {platform.system()})",
        BUG,
    )


def _say(message: str, code: int) -> int:
    print(f"lte: error: {one_line(message)}", file=sys.stderr)
    return code


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether this machine or a GPU has no memory left. torch has no type for the first."""
    names = {one.__name__ for one in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator" in str(error)


def _stdout_is_closed() -> bool:
    """Return whether nobody reads stdout any more, as with ``| head -1``. If so, replace it: Python flushes it."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):
        return False  # stdout is no file
    poll = select.poll()
    poll.register(stdout, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True
