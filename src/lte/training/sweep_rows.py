"""The rows of a sweep: which runs have one already, and the content of a run's row."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lte.evaluation.record import SUMMARY, Made, given, plain
from lte.evaluation.result_row import ResultRow
from lte.surgery.reading import read_json
from lte.training.row_identity import what_differs

ROWS = "rows.jsonl"

_ASKED, _SAID = ("model", "target_sparsity", "seed"), ("seed", "recipe", "steps")
"""Fields for the row of a command that does not evaluate: of its options, and of its model's first evaluation."""


def name_of(row: Mapping[str, Any]) -> str:
    """Return the varied options of a row's run, as a name."""
    return ", ".join(f"{name} {value}" for name, value in row["run"].items())


def read_sweep_rows(path: Path) -> list[ResultRow]:
    """Return the rows of a sweep so far.

    Raises:
        ValueError: a line is no row, for example because it is incomplete.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not {"run", "command"} <= row.keys():
            raise ValueError(f"{path} line {number} is no row of a sweep: delete the line, then its run is done again")
        rows.append(row)
    return rows


def row_of(
    varied: Mapping[str, str], identity: Mapping[str, str], command: str, rows: Sequence[ResultRow], folder: Path
) -> ResultRow | None:
    """Return the row that a run has already, by its varied options; None if it has none.

    Args:
        identity: the current one of the run, see :func:`lte.training.row_identity.row_identity`.
        command: the current one of the run. Rows without an identity are compared by it.

    Raises:
        ValueError: the row was made with other options or files.
    """
    found = [row for row in rows if row["run"] == varied and "error" not in row]
    for row in found:
        if "identity" not in row and row["command"] != command:
            raise ValueError(f"{folder} holds {name_of(row)} made with other options: take another folder")
        if "identity" in row and (changed := what_differs(row["identity"], identity)):
            raise ValueError(f"{folder} holds {name_of(row)}, but then {changed}: take another folder")
    return found[-1] if found else None


def of_trained(folder: Path, evals: list[ResultRow]) -> ResultRow:
    """Return the row of a run that trained the model in a folder, with further evaluations."""
    summary = {name: value for name, value in read_json(folder / SUMMARY).items() if name != "command"}
    return {**summary, "evals": evals} if evals else summary


def of_made(command: str, options: Any, evals: list[ResultRow]) -> ResultRow:
    """Return the row of a command that does not evaluate its model: its options and the first evaluation.

    Args:
        command: a caption.
        options: the parsed options of the command.
        evals: rows of ``lte eval``.
    """
    first, *evals = evals
    method, made = first["method"], first["made"]
    asked = {name: value for name, value in (method | vars(options)).items() if name in _ASKED}
    said = {name: first[name] for name in _SAID if name in first}
    if made:
        asked.pop("seed", None)
    else:  # its folder does not say it, e.g. after a training by an older version
        made = [vars(Made(command, options.model, options.data.text, given(options)))]
    row = {"environment": first["environment"], **said, **asked, "made": made, "method": method, "evaluation": first}
    return plain({**row, "evals": evals} if evals else row)


def diverged(row: ResultRow) -> str | None:
    """Return why a run failed if its loss is NaN; None for other runs."""
    loss = row["evaluation"].get("loss")
    return None if loss is None or math.isfinite(loss) else f"the run diverged: its loss is {loss}"
