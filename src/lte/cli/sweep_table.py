"""The output of ``lte sweep``: a line for each run when it ends, and a table of all runs."""

import statistics
from collections.abc import Iterable, Sequence

from lte.cli.console import err, table
from lte.evaluation.result_row import ResultRow
from lte.training.sweep_rows import name_of

_QUALITIES = ("rougeL", "bleu", "perplexity", "accuracy", "f1", "matthews", "pearson", "spearman")
_MEASURES = (*_QUALITIES, "sparsity", "gflops_per_token")
_BEYOND_FFN = ("attention_sparsity", "weight_sparsity")
"""Values that are shown if a row has them."""


def show(rows: Sequence[ResultRow]) -> None:
    """Print a table of the rows that did not fail. If the seed varies, it also has mean and spread over seeds."""
    good = [row for row in rows if "error" not in row]
    columns = list(dict.fromkeys(name for row in good for name in _measured(row)))
    lines = [[name_of(row), *(_number(_measured(row).get(name)) for name in columns)] for row in good]
    for name, several in _by_seed(good).items():
        values = [[_measured(row).get(column) for row in several] for column in columns]
        lines.append([f"{name}, {len(several)} seeds", *map(_mean_and_spread, values)])
    table("sweep", ["run", *columns], lines)
    for row in rows:
        if "error" in row:
            err.print(line_of(row), markup=False, soft_wrap=True)


def _measured(row: ResultRow) -> dict[str, float]:
    """Return the measured values of a run, by the heading of their columns."""
    found = {}
    for index, result in enumerate([row["evaluation"], *row.get("evals", [])]):
        values = {name: result.get(name) for name in _MEASURES}
        values |= {name: result[name] for name in _BEYOND_FFN if result.get(name, 0) >= 0.0005}
        for task, scores in result.get("results", {}).items():  # of lm_eval, under its names: "acc,none"
            values |= {
                f"{task} {key.removesuffix(',none')}": one for key, one in scores.items() if "_stderr" not in key
            }
        for name, value in values.items():
            if value is not None:
                found[f"{name} {index + 1}" if row.get("evals") else name] = value
    return found


def _by_seed(rows: Iterable[ResultRow]) -> dict[str, list[ResultRow]]:
    """Return groups of several rows that differ only in the seed."""
    found: dict[str, list[ResultRow]] = {}
    for row in rows:
        if "seed" in row["run"]:
            rest = {name: value for name, value in row["run"].items() if name != "seed"}
            found.setdefault(name_of({"run": rest}) or "all", []).append(row)
    return {name: several for name, several in found.items() if len(several) > 1}


def _mean_and_spread(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    return f"{_number(statistics.mean(numbers))} ± {_number(statistics.stdev(numbers))}" if len(numbers) > 1 else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def line_of(row: ResultRow) -> str:
    if "error" in row:
        return f"error: {name_of(row)}: {row['error']}"
    measured = ", ".join(f"{name} {_number(value)}" for name, value in _measured(row).items())
    return f"{name_of(row)}: {measured}; {row['seconds']:.0f} s"
