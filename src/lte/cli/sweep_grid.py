"""The runs of a sweep: every combination of the varied values, checked before the first run begins."""

import hashlib
import itertools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lte.cli.calibrate import parse_calibrate
from lte.cli.eval import parse_eval
from lte.cli.prune import parse_prune
from lte.cli.sparsify import parse_sparsify
from lte.cli.train import parse_train
from lte.training.row_identity import row_identity


@dataclass(frozen=True)
class Swept:
    """The properties of a command that makes a model.

    Attributes:
        parse: a function from arguments to options. It checks as much as possible before a model is loaded.
        output: the option that names its folder.
        flags: arguments of every run. Without ``--resume``, an interrupted run starts again and overwrites its files.
        evaluates: whether it evaluates the model itself and writes the result into its folder.
    """

    parse: Callable[[Sequence[str]], Any]
    output: str = "--output"
    flags: tuple[str, ...] = ()
    evaluates: bool = False


COMMANDS = {
    "train": Swept(parse_train, "--output-dir", ("--resume",), evaluates=True),
    "sparsify": Swept(parse_sparsify),
    "prune": Swept(parse_prune),
    "calibrate": Swept(parse_calibrate),
}


@dataclass(frozen=True)
class Run:
    """One point of the grid: its varied options, and all options of the command, as arguments and parsed."""

    name: str
    varied: dict[str, str]
    arguments: list[str]
    options: Any
    folder: Path
    evals: tuple[str, ...] = ()
    parsed_evals: tuple[Any, ...] = ()

    @property
    def commands(self) -> list[list[str]]:
        """The command that makes the model, and each ``lte eval``."""
        evals = [["eval", str(self.folder), *shlex.split(one)[1:], "--json"] for one in self.evals]
        return [[self.name, *self.arguments], *evals]

    @property
    def identity(self) -> dict[str, str]:
        """The identity of its options and files, as they are now."""
        return row_identity(self.options, *self.parsed_evals)

    @property
    def command(self) -> str:
        return " && ".join(shlex.join(["lte", *one]) for one in self.commands)


def plan(name: str, vary: Sequence[str], base: Sequence[str], folder: Path, evals: Sequence[str] = ()) -> list[Run]:
    """Return every combination of the values, checked by the commands' own parsers before the first run.

    Raises:
        ValueError: an entry is not ``option=value,value`` or is given twice, or there is no evaluation.
        UsageError: options that the command or ``lte eval`` refuses.
    """
    command = COMMANDS[name]
    if not (command.evaluates or evals):
        raise ValueError(f'lte {name} does not evaluate what it makes: add --then "eval --text FILE"')
    if not vary:
        raise ValueError("nothing varies: write an option and its values, --vary target-sparsity=0.3,0.5 seed=1,2,3")
    grid: dict[str, list[str]] = {}
    for entry in vary:
        option, _, values = entry.partition("=")
        option = option.removeprefix("--").replace("_", "-")
        if not option or not values or not all(values.split(",")):
            raise ValueError(f"{entry!r} does not say what varies: write an option and its values, seed=1,2,3")
        if f"--{option}" == command.output:
            raise ValueError(f"{option} cannot vary: each run has a folder of its own in that of the sweep")
        if option in grid:
            raise ValueError(f"{option} varies twice: give all its values at once, {option}=1,2,3")
        grid[option] = values.split(",")
    runs = []
    for values in itertools.product(*grid.values()):
        varied = dict(zip(grid, values, strict=True))
        inside = folder / _folder_name(varied)
        given = [one for option, value in varied.items() for one in (f"--{option}", value)]
        arguments = [*base, *given, command.output, str(inside), *command.flags]
        runs.append(Run(name, varied, arguments, command.parse(arguments), inside, tuple(evals)))
    parsed = []  # here, because parsing replaces stderr for a moment, for other threads too
    for one in evals:
        if shlex.split(one)[:1] != ["eval"]:
            raise ValueError(f"{one!r} is no eval: write it as for a shell, without the model, 'eval --text FILE'")
        checked = parse_eval(["MODEL", *shlex.split(one)[1:]])
        parsed.append(checked)
        if not (checked.data.text or checked.harness.tasks):
            raise ValueError(f"{one!r} does not name its data: add --text FILE or --tasks NAMES")
    folders = [run.folder for run in runs]
    if twice := next((one for one in folders if folders.count(one) > 1), None):
        raise ValueError(f"two runs would share the folder {twice.name}: give each value once, and other names")
    return [replace(run, parsed_evals=tuple(parsed)) for run in runs]


def _folder_name(varied: dict[str, str]) -> str:
    """Return the name of a run's folder: its varied options, cut to the longest name of a file system (255 bytes)."""
    name = "_".join(f"{option}-{value.replace('/', '-')}" for option, value in varied.items())
    whole = name.encode()
    if len(whole) <= 250:
        return name
    return f"{whole[:200].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:12]}"
