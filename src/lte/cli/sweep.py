"""``lte sweep``: ``lte train`` over a grid of options, a row a run; what is done is not done again."""

import itertools
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from lte.cli.console import err, print_json
from lte.cli.eval import parse_eval
from lte.cli.main import parse_known
from lte.cli.options import Output
from lte.cli.sweep_table import Row, line_of, name_of, show
from lte.cli.train import SUMMARY, parse_train

ROWS = "rows.jsonl"


@dataclass
class Sweep:
    output: Output
    """Folder for the runs, a folder each, and for their rows (rows.jsonl)."""
    vary: Annotated[
        tuple[str, ...], tyro.conf.arg(help="An option of lte train and its values: target-sparsity=0.3,0.5 seed=1,2.")
    ]
    then: tuple[str, ...] = ()
    """Further measurements of each trained model: lte eval without its model, as one string: "eval --text FILE"."""
    jobs: int = 1
    """Runs at a time, dealt out to the GPUs there are; each gets its share of the cores."""
    discard_models: bool = False
    """Delete each trained model once it is evaluated."""
    json: bool = False
    """Print one JSON object on the last line."""


@dataclass(frozen=True)
class Run:
    """One point of the grid: what varies, and the whole of ``lte train``'s options."""

    varied: dict[str, str]
    arguments: list[str]
    folder: Path
    evals: tuple[str, ...] = ()

    @property
    def commands(self) -> list[list[str]]:
        """``lte train`` and each ``lte eval``."""
        evals = [["eval", str(self.folder), *shlex.split(one)[1:], "--json"] for one in self.evals]
        return [["train", *self.arguments], *evals]

    @property
    def command(self) -> str:
        return " && ".join(shlex.join(["lte", *one]) for one in self.commands)


def main(argv: Sequence[str]) -> int:
    options, base = parse_known(Sweep, "sweep", argv)
    if options.jobs < 1:
        raise ValueError(f"jobs is {options.jobs}, but at least one run goes on at a time")
    folder = Path(options.output)
    runs = plan(options.vary, base, folder, options.then)
    before = [json.loads(line) for line in _lines(folder / ROWS)]
    done = {row["command"]: row for row in before if "error" not in row}
    _check_same_options(runs, before, folder)
    todo = [run for run in runs if run.command not in done]
    err.print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done already", markup=False)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ROWS).open("a") as file:
        for row in execute(todo, options.jobs, options.discard_models):
            file.write(json.dumps(row) + "\n")
            file.flush()
            err.print(line_of(row), markup=False, soft_wrap=True)
            done[row["command"]] = row
    rows = [done[run.command] for run in runs]
    show(rows)
    if options.json:
        print_json({"rows": rows})
    return int(any("error" in row for row in rows))


def plan(vary: Sequence[str], base: Sequence[str], folder: Path, evals: Sequence[str] = ()) -> list[Run]:
    """Every combination of the values, each checked by the commands' own parsers before any of them runs.

    Raises:
        ValueError: an entry that is not ``option=value,value``, or given twice.
        UsageError: options that ``lte train`` or ``lte eval`` refuses.
    """
    if not vary:
        raise ValueError("nothing varies: write an option and its values, --vary target-sparsity=0.3,0.5 seed=1,2,3")
    grid: dict[str, list[str]] = {}
    for entry in vary:
        name, _, values = entry.partition("=")
        name = name.removeprefix("--").replace("_", "-")
        if not name or not values or not all(values.split(",")):
            raise ValueError(f"{entry!r} does not say what varies: write an option and its values, seed=1,2,3")
        if name in grid:
            raise ValueError(f"{name} varies twice: give all its values at once, {name}=1,2,3")
        grid[name] = values.split(",")
    runs = []
    for values in itertools.product(*grid.values()):
        varied = dict(zip(grid, values, strict=True))
        inside = folder / "_".join(f"{name}-{value.replace('/', '-')}" for name, value in varied.items())
        given = [one for name, value in varied.items() for one in (f"--{name}", value)]
        arguments = [*base, *given, "--output-dir", str(inside), "--resume"]
        parse_train(arguments)
        runs.append(Run(varied, arguments, inside, tuple(evals)))
    for command in evals:
        if shlex.split(command)[:1] != ["eval"]:
            raise ValueError(f"{command!r} is no eval: write it as for a shell without the model, 'eval --text FILE'")
        parse_eval(["MODEL", *shlex.split(command)[1:]])
    return runs


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
    began = time.perf_counter()
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder.with_suffix(run.folder.suffix + ".log")
    row: Row = {"run": run.varied, "command": run.command}
    found: list[Row] = []
    with log.open("w") as file:
        for arguments in run.commands:
            command = [sys.executable, "-m", "lte.cli.main", *arguments]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=file, text=True, check=False)
            if done.returncode:
                file.flush()
                last = next((line for line in reversed(_lines(log)) if line.strip()), "")
                reason = last.removeprefix("lte: error: ").strip() or f"exit code {done.returncode}"
                return {**row, "error": reason if arguments[0] == "train" else f"{shlex.join(arguments)}: {reason}"}
            file.write(done.stdout)
            file.flush()  # before the next one's errors
            if arguments[0] == "eval":
                found.append(json.loads(done.stdout.splitlines()[-1]))
    row |= {"seconds": round(time.perf_counter() - began, 1)}
    summary = json.loads((run.folder / SUMMARY).read_text())
    if discard_models:
        for path in run.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != SUMMARY:
                path.unlink()
    row |= {name: value for name, value in summary.items() if name != "command"}
    return {**row, "evals": found} if found else row


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
    commands = {json.dumps(run.varied): run.command for run in runs}
    for row in before:
        if commands.get(json.dumps(row["run"]), row["command"]) != row["command"]:
            raise ValueError(f"{folder} holds {name_of(row)} made with other options: take another folder with -o")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
