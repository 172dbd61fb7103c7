"""``lte sweep``: a command over a grid of its options, a row a run; what is done is not done again."""

import hashlib
import itertools
import json
import math
import os
import queue
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from lte.cli.calibrate import parse_calibrate
from lte.cli.child import PARENT
from lte.cli.console import err, print_json
from lte.cli.eval import parse_eval
from lte.cli.eval_origin import training_of
from lte.cli.main import parse_known
from lte.cli.options import Output
from lte.cli.prune import parse_prune
from lte.cli.sparsify import parse_sparsify
from lte.cli.sweep_identity import row_identity, what_differs
from lte.cli.sweep_table import Row, line_of, name_of, show
from lte.cli.train import parse_train
from lte.evaluation.record import SUMMARY
from lte.files import append_line
from lte.surgery.reading import read_json
from lte.training.lock import alone_in

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Swept:
    """What is to be known of a command that makes a model.

    Attributes:
        parse: its options, from arguments; refuses what can be refused before a model is loaded.
        output: the option that names its folder.
        flags: given to every run. Without ``--resume``, a run cut short begins anew and saves over what there is.
        evaluates: whether it evaluates the model itself, and says so in its folder.
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
_ASKED = ("model", "seed", "target_sparsity", "recipe", "steps")
"""In the row of a command that does not evaluate, where there is such."""


@dataclass
class Sweep:
    """After the name of the command: these options, and its own."""

    output: Output
    """Folder for the runs, a folder each, and for their rows (rows.jsonl)."""
    vary: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help="Options of the command and their values: target-sparsity=0.3,0.5 seed=1,2."),
    ]
    then: tuple[str, ...] = ()
    """Measurements of each model, further ones after train: lte eval without its model, as one string:
    "eval --text FILE"."""
    jobs: int = 1
    """Number of runs at a time. They share all GPUs, and each gets its share of the cores."""
    discard_models: bool = False
    """Delete each model once it is evaluated."""
    json: bool = False
    """Print one JSON object on the last line."""


@dataclass(frozen=True)
class Run:
    """One point of the grid: what varies, and the whole of the command's options, as arguments and parsed."""

    name: str
    varied: dict[str, str]
    arguments: list[str]
    options: Any
    folder: Path
    evals: tuple[str, ...] = ()
    parsed_evals: tuple[Any, ...] = ()

    @property
    def commands(self) -> list[list[str]]:
        """What makes the model, and each ``lte eval``."""
        evals = [["eval", str(self.folder), *shlex.split(one)[1:], "--json"] for one in self.evals]
        return [[self.name, *self.arguments], *evals]

    @property
    def identity(self) -> dict[str, str]:
        """Of what it is made from, as it is now."""
        return row_identity(self.options, *self.parsed_evals)

    @property
    def command(self) -> str:
        return " && ".join(shlex.join(["lte", *one]) for one in self.commands)


def main(argv: Sequence[str]) -> int:
    name, *argv = argv if argv and argv[0] in COMMANDS else ("train", *argv)
    options, base = parse_known(Sweep, f"sweep {name}", argv)
    if options.jobs < 1:
        raise ValueError(f"jobs is {options.jobs}, but at least one run goes on at a time")
    folder = Path(options.output)
    runs = plan(name, options.vary, base, folder, options.then)
    with alone_in(folder):
        rows = _run(runs, folder, options)
    show(rows)
    if options.json:
        print_json({"rows": rows})
    return int(any("error" in row for row in rows))


def _run(runs: Sequence[Run], folder: Path, options: Sweep) -> list[Row]:
    """Execute what is not done yet; give the rows of all."""
    before = _read(folder / ROWS)
    done = {row["command"]: row for row in before if "error" not in row}
    _check_same_options(runs, before, folder)
    todo = [run for run in runs if run.command not in done]
    err.print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done already", markup=False)
    for row in execute(todo, options.jobs, options.discard_models):
        append_line(folder / ROWS, json.dumps(row))
        err.print(line_of(row), markup=False, soft_wrap=True)
        done[row["command"]] = row
    return [done[run.command] for run in runs]


def plan(name: str, vary: Sequence[str], base: Sequence[str], folder: Path, evals: Sequence[str] = ()) -> list[Run]:
    """Every combination of the values, each checked by the commands' own parsers before any of them runs.

    Raises:
        ValueError: an entry that is not ``option=value,value``, or given twice; no evaluation at all.
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
    parsed = []  # here, since parsing takes stderr away for a moment, from other threads too
    for one in evals:
        if shlex.split(one)[:1] != ["eval"]:
            raise ValueError(f"{one!r} is no eval: write it as for a shell without the model, 'eval --text FILE'")
        checked = parse_eval(["MODEL", *shlex.split(one)[1:]])
        parsed.append(checked)
        if not (checked.data.text or checked.questions.mmlu or checked.harness.tasks):
            raise ValueError(f"{one!r} does not say on what: add --text FILE, --mmlu FOLDER or --tasks NAMES")
    folders = [run.folder for run in runs]
    if twice := next((one for one in folders if folders.count(one) > 1), None):
        raise ValueError(f"two runs would share the folder {twice.name}: give each value once, and other names")
    return [replace(run, parsed_evals=tuple(parsed)) for run in runs]


def _folder_name(varied: dict[str, str]) -> str:
    """A run's folder: what varies, cut where file systems refuse a name as long (255 bytes, with ``.log``)."""
    name = "_".join(f"{option}-{value.replace('/', '-')}" for option, value in varied.items())
    whole = name.encode()
    if len(whole) <= 250:
        return name
    return f"{whole[:200].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:12]}"


def execute(runs: Sequence[Run], jobs: int, discard_models: bool) -> Iterable[Row]:
    """Rows as they come. Each run is a process of its own, so that one that fails takes no other with it."""
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)

    def one(run: Run) -> Row:
        slot = slots.get()
        try:
            return _execute(run, _environment(slot, jobs), discard_models)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(one, run) for run in runs]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _execute(run: Run, environment: dict[str, str], discard_models: bool) -> Row:
    began, environment = time.perf_counter(), {**environment, PARENT: str(os.getpid())}
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder.with_suffix(run.folder.suffix + ".log")
    row: Row = {"run": run.varied, "command": run.command, "identity": run.identity}
    found: list[Row] = []
    with log.open("w") as file:
        for arguments in run.commands:
            command = [sys.executable, "-m", "lte.cli.child", *arguments]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=file, text=True, check=False)
            if done.returncode:
                file.flush()
                last = next((line for line in reversed(_lines(log)) if line.strip()), "")
                reason = last.removeprefix("lte: error: ").strip() or f"exit code {done.returncode}"
                return {**row, "error": reason if arguments[0] == run.name else f"{shlex.join(arguments)}: {reason}"}
            file.write(done.stdout)
            file.flush()  # before the next one's errors
            if arguments[0] == "eval":
                found.append(json.loads(done.stdout.splitlines()[-1]))
    row |= {"seconds": round(time.perf_counter() - began, 1), **_summary(run, found)}
    loss = row["evaluation"].get("loss")
    if loss is not None and not math.isfinite(loss):
        return {name: row[name] for name in ("run", "command", "identity")} | {
            "error": f"the run diverged: its loss is {loss}"
        }
    if discard_models:
        for path in run.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != SUMMARY:
                path.unlink()
        if not any(run.folder.iterdir()):
            run.folder.rmdir()
    return row


def _summary(run: Run, evals: list[Row]) -> Row:
    """What training says of itself; elsewhere the like, of what was asked for and the first evaluation."""
    if COMMANDS[run.name].evaluates:
        trained = read_json(run.folder / SUMMARY)
        summary = {name: value for name, value in trained.items() if name != "command"}
    else:
        first, *evals = evals
        method = first["method"]
        asked = training_of(run.options.model, method["method"]) | method | vars(run.options)
        summary = {"environment": first["environment"], **{name: asked[name] for name in _ASKED if name in asked}}
        summary |= {"method": method, "evaluation": first}
    return {**summary, "evals": evals} if evals else summary


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """Of a run in this slot: one GPU, and a share of the cores unless the user has set it."""
    environment = dict(os.environ)
    gpus = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [str(index) for index in range(torch.cuda.device_count())]
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    return environment


def _check_same_options(runs: Sequence[Run], before: Sequence[Row], folder: Path) -> None:
    """Raise ValueError unless the rows there are made from the same options and files, as far as they say so."""
    planned = {json.dumps(run.varied): run for run in runs}
    for row in before:
        run = planned.get(json.dumps(row["run"]))
        if run is None or "error" in row:
            continue
        if run.command != row["command"]:
            raise ValueError(f"{folder} holds {name_of(row)} made with other options: take another folder with -o")
        if "identity" in row and (changed := what_differs(row["identity"], run.identity)):
            raise ValueError(f"{folder} holds {name_of(row)}, but then {changed}: take another folder with -o")


def _read(path: Path) -> list[Row]:
    """The rows of a sweep so far.

    Raises:
        ValueError: a line that is none, as one that was cut off while it was written.
    """
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not {"run", "command"} <= row.keys():
            raise ValueError(f"{path} line {number} is no row of a sweep: take it out, and its run is done again")
        rows.append(row)
    return rows


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
