"""Reading rows of results: what ``lte train``, ``lte eval``, ``lte sweep`` and ``lte bench`` write."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lte.evaluation.record import Made, Measured, Record, records_in
from lte.evaluation.result_row import ResultRow
from lte.report.fields import QUALITY
from lte.report.metrics import METRICS, TASK_METRICS, Metric
from lte.report.rows import read_result_rows

_DIVERGED = 1e9
"""A quality from here on, or NaN, is that of a run that diverged: nothing can be drawn beside it."""

TITLES = {
    "lte": "LTE",
    "deja-vu": "Deja Vu",
    "moefication": "MoEfication",
    "relufication": "ReLUfication",
    "cats": "CATS",
    "teal": "TEAL",
    "wanda": "Wanda",
    "magnitude": "magnitude pruning",
    "pruned-weights": "pruned weights",
    "static-pruning": "static pruning",
    "topk-moe": "top-k MoE",
    "noisy-topk": "noisy top-k",
    "sigma-moe": "sigma-MoE",
}
"""How the page calls methods; others go by their own name."""


Setting = tuple[tuple[str, ...], ...]
"""Options as a shell has them, command by command."""


@dataclass(frozen=True)
class Measurement:
    """One evaluation of one model.

    Attributes:
        qualities: as shown, by metric, in the order of :data:`METRICS`.
        task: the data it was measured on, as short as its path allows; empty where the row does not say.
        data: the same as it was given.
        count: of labels, prompts or questions, as ``unit`` says; it tells data apart as well.
        run: what made the model, or its name: measurements of one model share it.
        setting: the options of each command that made the model, and of the one that measured it, without the seed and
            folders to write to: runs that share it differ in nothing but these.
        seed: the seeds of the commands that made the model, in order.
        steps: training steps of all stages; 0 for methods that need none, and where a row does not say.
        sparsity: of FFNs; of a model whose single weights are 0, their share.
        beyond_ffn: what else is sparse, so that sparsities do not compare: attention's inputs, or weights.
    """

    qualities: Mapping[Metric, float]
    task: str
    data: tuple[str, ...]
    count: int
    unit: str
    model: str
    method: str
    run: Setting
    setting: Setting
    seed: tuple[int | None, ...]
    steps: int
    sparsity: float
    gflops: float
    gflops_dense: float
    layer_sparsity: tuple[float, ...] = ()
    beyond_ffn: Literal["", "inputs", "weights"] = ""


@dataclass
class Results:
    """What the files held: measurements, lines of ``lte bench``, failed runs, and how many rows were neither."""

    measurements: list[Measurement] = field(default_factory=list)
    benches: list[ResultRow] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    others: int = 0

    def counted(self) -> str:
        """What there is, in words; measurements of one model, as it was made with one seed, are one run."""
        runs = {(one.run, one.seed, one.method) for one in self.measurements}
        held = [
            (len(runs), "run", "of models"),
            (len(self.benches), "run", "of lte bench"),
            (len(self.failures), "failed run", ""),
            (self.others, "row", "of other kinds, left out"),
        ]
        return ", ".join(f"{count} {what}{'s' if count > 1 else ''} {of}".strip() for count, what, of in held if count)


def read_results(files: Iterable[Path]) -> Results:
    """Everything in some results files: ``.jsonl``, a row a line, or one JSON object.

    Raises:
        ValueError: as :func:`lte.report.rows.read_result_rows`.
    """
    found, failed, done = Results(), {}, set()
    for path in files:
        for row in read_result_rows(path):
            if "error" in row:
                failed[str(row.get("command", ""))] = _run(row), str(row["error"])
            elif row.get("bench") is not None:
                found.benches.append(row)
                found.failures += [(_run(row), str(one["error"])) for one in row["rows"] if "error" in one]
            elif measured := list(_measurements(row)):
                for one in measured:
                    if not math.isfinite(one.sparsity):
                        found.failures.append((_run(row), f"sparsity is {one.sparsity}"))
                        continue
                    good = {metric: value for metric, value in one.qualities.items() if abs(value) < _DIVERGED}
                    bad = {metric.name: value for metric, value in one.qualities.items() if metric not in good}
                    found.failures += [(_run(row), f"{name} is {value:g}") for name, value in bad.items()]
                    found.measurements += [replace(one, qualities=good)] if good else []
                done.add(row.get("command"))
            else:
                found.others += 1
    found.failures += [failure for command, failure in failed.items() if command not in done]
    return found


def _run(row: ResultRow) -> str:
    varied = row.get("run")
    if isinstance(varied, dict):
        return ", ".join(f"{name} {value}" for name, value in varied.items())
    return str(row.get("command", "a run that does not say which"))


def _measurements(row: ResultRow) -> Iterator[Measurement]:
    for record in records_in(row):
        if all(isinstance(record.evaluation.get(name), int | float) for name in ("sparsity", "gflops_per_token")):
            yield from _measured(record)


def _measured(record: Record) -> Iterator[Measurement]:
    one = record.evaluation
    method, zeros = _method(record), float(one.get("weight_sparsity") or 0.0)
    pruned = method != "dense" and zeros > 0
    made = tuple(map(_options, record.made)) or ((f"--model {record.model}",) if record.model else (),)
    began_with = next((step.model for step in record.made if step.model), "")
    name = began_with or (record.model if method == "dense" else "")
    for qualities, task, count, unit in _qualities(one, _task(record.measured), record.measured.data):
        yield Measurement(
            qualities=qualities,
            task=task,
            data=record.measured.data,
            count=count,
            unit=unit,
            model=Path(name).name,
            method=method,
            run=made,
            setting=(*made, _options(record.measured)),
            seed=(record.seed, *(seed for step in record.made if isinstance(seed := step.options.get("seed"), int))),
            steps=int(sum(record.steps.values())),
            sparsity=zeros if pruned else float(one["sparsity"]),
            gflops=float(one["gflops_per_token"]),
            gflops_dense=float(one.get("gflops_per_token_dense") or one["gflops_per_token"]),
            layer_sparsity=tuple(one.get("layer_sparsity") or ()),
            beyond_ffn="weights" if pruned else "inputs" if one.get("attention_sparsity") else "",
        )


def _options(step: Made | Measured) -> tuple[str, ...]:
    """As a shell has them, without the seed. Its model and data come first, but where older rows have them inside."""
    of_made = {"model": step.model, "text": " ".join(step.data)} if isinstance(step, Made) else {}
    first = {name: value for name, value in of_made.items() if value and name not in step.options}
    return tuple(_as_option(name, value) for name, value in {**first, **step.options}.items() if name != "seed")


def _as_option(name: str, value: Any) -> str:
    flag = name if name.startswith("-") or not name else f"--{name.replace('_', '-')}"
    words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return flag if value is True else f"{flag} {words}".strip()


_STORED = re.compile(r"(\.(txt|jsonl|json|csv|tsv|parquet|arrow|npy|gz))+$")


def _task(measured: Measured) -> str:
    """The data: of each path its last two parts, without what says how it is stored."""
    if measured.kind in ("MMLU", "lm_eval"):
        return measured.kind
    parts = [Path(source).parts[-2:] for source in measured.data]
    names = " ".join("/".join([*folder, _STORED.sub("", name)]).lstrip("/") for *folder, name in parts)
    return f"{names}, held out" if names and measured.kind == "held out" else names


def _qualities(
    one: Mapping[str, Any], task: str, asked: Iterable[str]
) -> Iterator[tuple[dict[Metric, float], str, int, str]]:
    """Qualities, task, and how many of what they were measured on; of lm_eval's tasks those that were asked for."""
    unit = next((unit for unit in ("prompts", "questions", "tokens") if f"num_{unit}" in one), "tokens")
    found = {metric: metric.scale * one[metric.name] for metric in METRICS if one.get(metric.name) is not None}
    if found:
        yield found, task, int(one.get(f"num_{unit}") or 0), "labels" if unit == "tokens" else unit
    results = one.get("results") or {}
    for name in [name for name in asked if name in results] or results:  # without the subjects of MMLU
        scores = {
            metric: metric.scale * results[name][key]
            for key, metric in TASK_METRICS.items()
            if QUALITY[1](results[name].get(key))
        }
        if scores:
            yield scores, name, int((one.get("num_samples") or {}).get(name) or 0), "questions"


def _method(record: Record) -> str:
    """The title of its method. Where a method has a choice that makes it another one, with that, unless it is ours."""
    options, recipe = record.method, record.recipe
    name = options.get("method")
    if recipe == "dense" or name == "dense":
        return "dense"
    if name is None:
        if recipe is None:
            return "dense" if record.evaluation.get("mode") == "dense" else "unnamed method"
        name = "lte"
    title = TITLES.get(name, name)
    if options.get("selection", "mlp") not in ("mlp", "threshold"):
        title += f", {str(options['selection']).replace('_', '-')}"
    if options.get("pattern"):
        title += f", {options['pattern']}"
    if options.get("attention_sparsity"):
        title += " and attention"
    if options.get("activation") and name != "relufication":
        title += f", {options['activation']}"
    return f"{title}, paper's schedule" if recipe == "paper" else title
