"""What ``lte bench`` prints and writes: rows as they come, a table, one JSON line with where it was measured."""

import json
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from lte.bench.shapes import SHAPES
from lte.cli.console import err, print_json, table
from lte.evaluation.environment import commit, device_name, versions
from lte.evaluation.result_row import ResultRow
from lte.files import append_line, write_whole
from lte.ops.sparse_ffn import COMPILED, BackendName, missing
from lte.report.plots import plot_speed

ShapeName = Annotated[str, tyro.conf.arg(help=f"Random weights of a published size: {', '.join(SHAPES)}.")]
Sparsities = Annotated[tuple[float, ...], tyro.conf.arg(help="Sparsities to ask of the routers; 0 is every expert.")]
NumericDtype = Literal["float32", "bfloat16", "float16"]
BackendOption = Literal["device", "auto", "reference", "triton", "cpu"]


@dataclass
class BenchOutput:
    """Where results go."""

    json: bool = False
    """Print one JSON object on the last line."""
    output: Annotated[str | None, tyro.conf.arg(aliases=("-o",))] = None
    """Append that line to this .jsonl file."""
    plot: str | None = None
    """Write a picture to this .png file."""

    def check(self) -> None:
        """Refuse, before anything is timed, what could not be written after it.

        Raises:
            ValueError: a folder in place of a file, a picture that is no .png or has no folder to go to.
        """
        if self.output is not None and (self.output.endswith("/") or Path(self.output).is_dir()):
            raise ValueError(f"output {self.output} is a folder: name a .jsonl file in it")
        if self.plot is None:
            return
        plot = Path(self.plot)
        if plot.suffix.lower() != ".png" or plot.is_dir():
            raise ValueError(f"plot is {self.plot}, but a picture is a file that ends in .png")
        if not plot.parent.is_dir():
            raise ValueError(f"plot is {self.plot}, but there is no folder {plot.parent}: make it first")


class BenchReport:
    """Collects rows. Each is shown and kept in ``OUTPUT.partial`` at once, so that a run cut short loses only one."""

    def __init__(
        self, bench: str, argv: Sequence[str], device: torch.device, gb_per_s: float | None, output: str | None
    ) -> None:
        self.values: dict[str, Any] = {
            "bench": bench,
            "command": shlex.join(["lte", "bench", bench, *argv]),
            "device": device_name(device),
            "versions": versions(),
            "commit": commit(),
            "copy_gb_per_s": gb_per_s,
            "rows": [],
        }
        self._output = None if output is None else Path(output)
        if self._output is not None:
            self._output.parent.mkdir(parents=True, exist_ok=True)

    @property
    def rows(self) -> list[ResultRow]:
        return self.values["rows"]

    @property
    def failed(self) -> bool:
        return any("error" in row for row in self.rows)

    def collect(self, rows: Iterable[ResultRow], show: Callable[[ResultRow], str]) -> None:
        """Take rows as they come."""
        for row in rows:
            self.rows.append(row)
            err.print(
                f"error: {_where(row)}: {row['error']}" if "error" in row else show(row), markup=False, soft_wrap=True
            )
            if self._output is not None:
                write_whole(self._partial, json.dumps(self.values) + "\n")

    def plot(self, path: str, by: str, title: str) -> None:
        """Write a picture, a line for each value of ``by``."""
        plot_speed(self.rows, by, Path(path), f"{title}, {self.values['device']}")

    def finish(self, title: str, columns: dict[str, Callable[[ResultRow], str]], as_json: bool) -> int:
        """Print the table, append the JSON line, print it; give the exit code."""
        good = [row for row in self.rows if "error" not in row]
        table(
            f"{title}, {self.values['device']}",
            list(columns),
            [[cell(row) for cell in columns.values()] for row in good],
        )
        for row in self.rows:
            if "error" in row:
                err.print(f"error: {_where(row)}: {row['error']}", markup=False)
        if self._output is not None:
            append_line(self._output, json.dumps(self.values))
            self._partial.unlink(missing_ok=True)
        if as_json:
            print_json(self.values)
        return int(self.failed)

    @property
    def _partial(self) -> Path:
        assert self._output is not None
        return self._output.with_name(f"{self._output.name}.partial")


def _where(row: ResultRow) -> str:
    return " ".join(f"{key} {value}" for key, value in row.items() if key not in ("error", "shape"))


def check_sparsities(given: Sequence[float]) -> None:
    if not given or not all(0 <= one <= 1 and math.isfinite(one) for one in given):
        raise ValueError(f"sparsity is {given}, but each is a fraction between 0 (dense) and 1")


def check_positive(name: str, given: Sequence[int]) -> None:
    if not given or min(given) < 1:
        raise ValueError(f"{name} is {given}, but each is at least 1")


def resolve_backend(name: str, device: torch.device) -> BackendName:
    """The backend to ask for by name.

    Raises:
        ValueError: it is not installed.
    """
    backend = COMPILED.get(device.type, "reference") if name == "device" else name
    if backend != "auto" and (reason := missing(backend)) is not None:
        raise ValueError(f"backend {backend!r} cannot run here: {reason}")
    return backend  # pyright: ignore[reportReturnType]
