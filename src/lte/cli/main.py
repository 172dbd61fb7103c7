"""Entry point of ``lte``: finds the command, runs it, and turns bad input into one line and exit code 2."""

import contextlib
import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lte.cli.failures import UsageError, explain, one_line
from lte_start import COMMANDS, answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lte`` with ``argv`` (default: the process's) and return its exit code.

    ValueError, OSError, ImportError and UsageError mean bad input: they give one line and code 2. Any other exception
    is our mistake: it gives its traceback, a request to report it, and code 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt) as error:
        return explain(error, arguments[0] if arguments else "")


def _run(arguments: list[str]) -> int:
    if (said := answer(arguments)) is not None:
        print(said)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}: use one of {', '.join(COMMANDS)}")
    with _quiet():
        return importlib.import_module(f"lte.cli.{name}").main(rest) or 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Show our own warnings as lines. Show only errors of other libraries, unless LTE_DEBUG is set."""
    ours, handler = logging.getLogger("lte"), _Lines(logging.WARNING)
    ours.addHandler(handler)
    try:
        if not os.environ.get("LTE_DEBUG"):
            from huggingface_hub.utils import logging as hub_logging
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
            transformers_logging.set_verbosity_error()
            hub_logging.set_verbosity_error()
            for name in ("lm_eval", "torchao", "torch.utils._pytree"):  # torchao is imported by transformers
                logging.getLogger(name).setLevel(logging.ERROR)
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield
    finally:
        ours.removeHandler(handler)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(f"lte: {record.levelname.lower()}: {one_line(record.getMessage())}", file=sys.stderr)


def parse(options: Callable[..., Any], command: str, argv: Sequence[str]) -> Any:
    """Parse ``argv`` into ``options`` with tyro.

    Raises:
        UsageError: the arguments cannot be parsed. The message is one line.
    """
    return _parse(options, command, argv)


def parse_known(options: Callable[..., Any], command: str, argv: Sequence[str]) -> tuple[Any, list[str]]:
    """As :func:`parse`, but return arguments that are not among these options as a list."""
    return _parse(options, command, argv, return_unknown_args=True)


def _parse(options: Callable[..., Any], command: str, argv: Sequence[str], **more: Any) -> Any:
    import tyro

    stderr = io.StringIO()
    about = COMMANDS[command.split()[0]]
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                options,
                prog=f"lte {command}",
                description=f"{about[0].upper()}{about[1:]}.",
                args=argv,
                config=(tyro.conf.OmitArgPrefixes,),
                **more,
            )
    except SystemExit as stop:
        if not stop.code:
            sys.stdout.flush()  # the reader of the help is gone
            raise
        plain = re.sub(r"\x1b\[[0-9;]*m|[─│╭╮╰╯]", " ", stderr.getvalue()).split("For full helptext")[0]
        message = " ".join(plain.replace("Required options", "", 1).split())
        raise UsageError(f"{message}{_instead(message)} (see lte {command} --help)") from None


_REMOVED = {
    "--warmup-ratio": "--warmup-steps, where a number below 1 is a share of each stage",
    "--evaluation-strategy": "--eval-strategy",
    "--no-cuda": "--device cpu",
    "--per-gpu-train-batch-size": "--per-device-train-batch-size",
    "--per-gpu-eval-batch-size": "--per-device-eval-batch-size",
    "--group-by-length": "--train-sampling-strategy group_by_length",
    "--adafactor": "--optim adafactor",
    "--torchdynamo": "--torch-compile-backend",
    "--split-batches": "--accelerator-config",
    "--dispatch-batches": "--accelerator-config",
    "--include-inputs-for-metrics": "--include-for-metrics inputs",
    "--include-tokens-per-second": "--include-num-input-tokens-seen",
    "--push-to-hub-model-id": "--hub-model-id",
    "--push-to-hub-token": "--hub-token",
    "--logging-dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "--save-safetensors": "nothing: weights are always saved in this format",
}
"""Former options of transformers, and their replacements."""


def _instead(message: str) -> str:
    unknown = re.findall(r"--[\w-]+", message.partition("nrecognized options: ")[2].replace("_", "-"))
    return "".join(f"; in place of {old} use {new}" for old, new in _REMOVED.items() if old in unknown)


if __name__ == "__main__":  # with python -m this module has another name than in imports
    sys.exit(importlib.import_module("lte.cli.main").main())
