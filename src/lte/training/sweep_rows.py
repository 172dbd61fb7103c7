"""The rows of a sweep: which runs have theirs already, and what the row of a run says."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lte.evaluation.origin import training_of
from lte.evaluation.record import SUMMARY, Made, given, plain
from lte.surgery.reading import read_json
from lte.training.row_identity import what_differs

ROWS = "rows.jsonl"
Row = dict[str, Any]

_ASKED = ("model", "seed", "target_sparsity", "recipe", "steps")
"""In the row of a command that does not evaluate, where there is such."""


def name_of(row: Mapping[str, Any]) -> str:
    """What varies in a row's run."""
    return ", ".join(f"{name} {value}" for name, value in row["run"].items())


def read_rows(path: Path) -> list[Row]:
    """The rows of a sweep so far.

    Raises:
        ValueError: a line that is none, as one that was cut off while it was written.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not {"run", "command"} <= row.keys():
            raise ValueError(f"{path} line {number} is no row of a sweep: take it out, and its run is done again")
        rows.append(row)
    return rows


def row_of(
    varied: Mapping[str, str], identity: Mapping[str, str], command: str, rows: Sequence[Row], folder: Path
) -> Row | None:
    """The row that a run has already, by what varies in it; None where it has none.

    Args:
        identity: of the run now, see :func:`lte.training.row_identity.row_identity`.
        command: of the run now; compared with that of rows without an identity.

    Raises:
        ValueError: the row is of other options or files.
    """
    found = [row for row in rows if row["run"] == varied and "error" not in row]
    for row in found:
        if "identity" not in row and row["command"] != command:
            raise ValueError(f"{folder} holds {name_of(row)} made with other options: take another folder")
        if "identity" in row and (changed := what_differs(row["identity"], identity)):
            raise ValueError(f"{folder} holds {name_of(row)}, but then {changed}: take another folder")
    return found[-1] if found else None


def of_trained(folder: Path, evals: list[Row]) -> Row:
    """What a row says of a run that trained the model in a folder, and of further evaluations."""
    summary = {name: value for name, value in read_json(folder / SUMMARY).items() if name != "command"}
    return {**summary, "evals": evals} if evals else summary


def of_made(command: str, options: Any, evals: list[Row]) -> Row:
    """The like of a command that does not evaluate what it makes: of what was asked for and of the first evaluation.

    Args:
        command: a caption.
        options: of the command, as they were parsed.
        evals: rows of ``lte eval``.
    """
    first, *evals = evals
    method = first["method"]
    training = training_of(options.model, method["method"])
    before = training.get("made", ())
    step = Made(command, "" if before else options.model, options.data.text, given(options))
    asked = training | method | vars(options)
    row = {"environment": first["environment"], **{name: asked[name] for name in _ASKED if name in asked}}
    row |= {"made": [vars(one) for one in (*before, step)], "method": method, "evaluation": first}
    return plain({**row, "evals": evals} if evals else row)


def diverged(row: Row) -> str | None:
    """Why a run whose loss is no number has failed; None for others."""
    loss = row["evaluation"].get("loss")
    return None if loss is None or math.isfinite(loss) else f"the run diverged: its loss is {loss}"
