"""Scores of lm_eval's tasks beside those of the original model, the one that training or a conversion began with."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lte.report.layout import Section, TextTable
from lte.report.metrics import Metric
from lte.report.results import Measurement

Column = tuple[str, Metric]
"""A task and one of its metrics."""


def scores(measurements: Sequence[Measurement]) -> list[Section]:
    """Return a section with a row for each model; none unless tasks were run on a model and on its original.

    Scores are compared if task, number of questions and options of the measurement are the same. Of several
    measurements of one model, the last one counts.
    """
    asked = [one for one in measurements if one.unit == "questions" and one.model]
    originals = {(*_questions(one), metric): value for one in asked if _original(one) for metric, value in _all(one)}
    models: dict[tuple[Any, ...], dict[Column, tuple[Measurement, float, float | None]]] = {}
    for one in asked:
        cells = models.setdefault((one.model, one.method, one.run, one.seed), {})
        for metric, value in _all(one):
            cells[one.task, metric] = (one, value, originals.get((*_questions(one), metric)))
    models = {key: cells for key, cells in models.items() if any(of is not None for _, _, of in cells.values())}
    if len(models) < 2:
        return []
    columns = list(dict.fromkeys(column for cells in models.values() for column in cells))
    rows = [_row(cells, columns) for cells in models.values()]
    header = ("model", "sparsity, %", "GFLOPs per token", *(f"{task}: {metric.title}" for task, metric in columns))
    text = (
        "Each score is followed by its share of the original model's score, on the same questions asked in the same "
        "way. A share near 100 % says nothing about a model that does little more than guess.",
    )
    return [
        Section(
            "scores-of-tasks",
            "Tasks, against the original model",
            text,
            tables=(TextTable("Tasks", header, tuple(rows)),),
        )
    ]


def _original(one: Measurement) -> bool:
    return one.method == "dense" and not one.steps


def _questions(one: Measurement) -> tuple[Any, ...]:
    return one.model, one.task, one.count, one.setting[-1:]


def _all(one: Measurement) -> Iterable[tuple[Metric, float]]:
    return one.qualities.items()


def _row(cells: Mapping[Column, tuple[Measurement, float, float | None]], columns: Sequence[Column]) -> tuple[str, ...]:
    first, *_ = (one for one, _, _ in cells.values())
    name = f"{first.model}, the original" if _original(first) else f"{first.model}, {first.method}"
    texts = []
    for column in columns:
        _, value, original = cells.get(column, (None, None, None))
        share = f" ({value / original:.1%})" if value is not None and original and not _original(first) else ""
        texts.append("" if value is None else f"{value:.2f}{share}")
    return name, f"{100 * first.sparsity:.1f}", f"{first.gflops:.4g}", *texts
