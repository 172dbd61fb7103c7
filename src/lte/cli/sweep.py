"""``lte sweep``: runs a command over a grid of its options, with a row for each run. Finished runs are not repeated."""

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

from lte.cli.child import PARENT
from lte.cli.console import err, print_json
from lte.cli.main import parse_known
from lte.cli.options import Output
from lte.cli.sweep_grid import COMMANDS, Run, plan
from lte.cli.sweep_table import line_of, show
from lte.evaluation.record import SUMMARY
from lte.evaluation.result_row import ResultRow
from lte.files import append_line
from lte.training.lock import alone_in
from lte.training.sweep_rows import ROWS, diverged, of_made, of_trained, read_sweep_rows, row_of


@dataclass
class Sweep:
    """Give these options and those of the command after the name of the command."""

    output: Output
    """Folder for the folders of all runs and for their rows (rows.jsonl)."""
    vary: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help="Options of the command and their values: target-sparsity=0.3,0.5 seed=1,2."),
    ]
    then: tuple[str, ...] = ()
    """Measurements of each model (further ones after train): lte eval without its model, as one string:
    "eval --text FILE"."""
    jobs: int = 1
    """Number of runs at a time. They share all GPUs, and each gets its share of the cores."""
    discard_models: bool = False
    """Delete each model after it is evaluated."""
    json: bool = False
    """Print one JSON object on the last line."""


def main(argv: Sequence[str]) -> int:
    name, *argv = argv if argv and argv[0] in COMMANDS else ("train", *argv)
    options, base = parse_known(Sweep, f"sweep {name}", argv)
    if options.jobs < 1:
        raise ValueError(f"jobs is {options.jobs}, but at least 1 is needed")
    folder = Path(options.output)
    runs = plan(name, options.vary, base, folder, options.then)
    with alone_in(folder):
        rows = _run(runs, folder, options)
    show(rows)
    if options.json:
        print_json({"rows": rows})
    return int(any("error" in row for row in rows))


def _run(runs: Sequence[Run], folder: Path, options: Sweep) -> list[ResultRow]:
    """Execute all runs that are not done yet. Return the rows of all runs."""
    before = read_sweep_rows(folder / ROWS)
    done = {run.folder: row_of(run.varied, run.identity, run.command, before, folder) for run in runs}
    todo = [run for run in runs if done[run.folder] is None]
    err.print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done already", markup=False)
    for run, row in execute(todo, options.jobs, options.discard_models):
        append_line(folder / ROWS, json.dumps(row))
        err.print(line_of(row), markup=False, soft_wrap=True)
        done[run.folder] = row
    return [row for row in done.values() if row is not None]


def execute(runs: Sequence[Run], jobs: int, discard_models: bool) -> Iterable[tuple[Run, ResultRow]]:
    """Give runs with their rows when they end. Each run is a process, so a failed run does not stop the others."""
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)

    def one(run: Run) -> tuple[Run, ResultRow]:
        slot = slots.get()
        try:
            return run, _execute(run, _environment(slot, jobs), discard_models)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(one, run) for run in runs]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _execute(run: Run, environment: dict[str, str], discard_models: bool) -> ResultRow:
    began, environment = time.perf_counter(), {**environment, PARENT: str(os.getpid())}
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder.with_suffix(run.folder.suffix + ".log")
    row: ResultRow = {"run": run.varied, "command": run.command, "identity": run.identity}
    found: list[ResultRow] = []
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
            file.flush()  # print it before the errors of the next one
            if arguments[0] == "eval":
                found.append(json.loads(done.stdout.splitlines()[-1]))
    made = shlex.join(["lte", *run.commands[0]])
    said = of_trained(run.folder, found) if COMMANDS[run.name].evaluates else of_made(made, run.options, found)
    if reason := diverged(said):
        return {**row, "error": reason}
    row |= {"seconds": round(time.perf_counter() - began, 1), **said}
    if discard_models:
        for path in run.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != SUMMARY or not COMMANDS[run.name].evaluates:
                path.unlink()
        if not any(run.folder.iterdir()):
            run.folder.rmdir()
    return row


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """Return the environment of a run in this slot: one GPU, and a share of the cores unless the user set it."""
    environment = dict(os.environ)
    gpus = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [str(index) for index in range(torch.cuda.device_count())]
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    return environment


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
