"""Reading rows of results: what ``lte train``, ``lte eval``, ``lte sweep`` and ``lte bench`` write."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lte.report.commands import parse_command, setting_of, split_commands, task_of
from lte.report.fields import QUALITY
from lte.report.metrics import ACCURACY, METRICS, Metric
from lte.report.rows import Row, read_rows

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


@dataclass(frozen=True)
class Measurement:
    """One evaluation of one model.

    Attributes:
        qualities: as shown, by metric, in the order of :data:`METRICS`.
        task: the data it was measured on, as short as the command allows; empty where the row does not say.
        count: of labels, prompts or questions, as ``unit`` says; it tells data apart as well.
        run: what made the model, or its name: measurements of one model share it.
        setting: the command without seed and folders: runs that share it differ in nothing but the seed.
        steps: training steps of all stages; 0 for methods that need none, and where a row does not say.
        sparsity: of FFNs; of a model whose single weights are 0, their share.
        beyond_ffn: what else is sparse, so that sparsities do not compare: attention's inputs, or weights.
    """

    qualities: Mapping[Metric, float]
    task: str
    count: int
    unit: str
    model: str
    method: str
    run: str
    setting: str
    seed: int | None
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
    benches: list[Row] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    others: int = 0


def read_results(files: Iterable[Path]) -> Results:
    """Everything in some results files: ``.jsonl``, a row a line, or one JSON object.

    Raises:
        ValueError: as :func:`lte.report.rows.read_rows`.
    """
    found, failed, done = Results(), {}, set()
    for path in files:
        for row in read_rows(path):
            if "error" in row:
                failed[str(row.get("command", ""))] = _run(row), str(row["error"])
            elif isinstance(row.get("rows"), list) and str(row.get("command", "")).startswith("lte bench"):
                found.benches.append(row)
                found.failures += [(row["command"], str(one["error"])) for one in row["rows"] if "error" in one]
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


def _run(row: Row) -> str:
    varied = row.get("run")
    if isinstance(varied, dict):
        return ", ".join(f"{name} {value}" for name, value in varied.items())
    return str(row.get("command", "a run that does not say which"))


def _measurements(row: Row) -> Iterator[Measurement]:
    evaluations = [row["evaluation"], *(row.get("evals") or [])] if isinstance(row.get("evaluation"), dict) else [row]
    for one in evaluations:
        yield from _measured(row, one, _commands(row, one))


def _commands(row: Row, one: Row) -> list[str]:
    """What was run for an evaluation, in order: what trained the model, the row's command, the evaluation's own."""
    command, own = (str(where.get("command", "")) for where in (row, one))
    made = command if own in ("", command) else split_commands(command)[0]  # the others are evaluations
    trained = split_commands(row.get("trained_by") or "")  # lte calibrate --in-place may follow lte train
    return list(dict.fromkeys(filter(None, (*trained, made, own)))) or [""]


def _measured(row: Row, one: Row, commands: list[str]) -> Iterator[Measurement]:
    if not all(isinstance(one.get(name), int | float) for name in ("sparsity", "gflops_per_token")):
        return
    steps = row.get("steps")
    parsed = [parse_command(command, str(row.get("model", ""))) for command in commands]
    settings = list(map(setting_of, parsed))
    named = next((options["--model"] for options in parsed if "--model" in options), "")
    if "trained_by" not in row and "model" in row and not named:  # nothing but its name tells it from other models
        settings.insert(0, f"--model {row['model']}")
    single = [one for command in commands for one in split_commands(command)]
    made = [one for one in single if not one.startswith("lte eval")]
    method, zeros = _method(row, one), float(one.get("weight_sparsity") or 0.0)
    pruned = method != "dense" and zeros > 0
    name = named or (row.get("model", "") if method == "dense" else "")
    for qualities, task, count, unit in _qualities(one, task_of(parsed[-1])):
        yield Measurement(
            qualities=qualities,
            task=task,
            count=count,
            unit=unit,
            model=Path(name).name,
            method=method,
            run=" && ".join(made) or str(row.get("model", commands[0])),
            setting=" ".join(settings),
            seed=row.get("seed"),
            steps=sum(steps.values()) if isinstance(steps, dict) else 0,
            sparsity=zeros if pruned else float(one["sparsity"]),
            gflops=float(one["gflops_per_token"]),
            gflops_dense=float(one.get("gflops_per_token_dense") or one["gflops_per_token"]),
            layer_sparsity=tuple(one.get("layer_sparsity") or ()),
            beyond_ffn="weights" if pruned else "inputs" if one.get("attention_sparsity") else "",
        )


def _qualities(one: Row, task: str) -> Iterator[tuple[dict[Metric, float], str, int, str]]:
    """Qualities, task, and how many of what they were measured on; of lm_eval's tasks their accuracies."""
    unit = next((unit for unit in ("prompts", "questions", "tokens") if f"num_{unit}" in one), "tokens")
    found = {metric: metric.scale * one[metric.name] for metric in METRICS if one.get(metric.name) is not None}
    if found:
        yield found, task, int(one.get(f"num_{unit}") or 0), "labels" if unit == "tokens" else unit
    for name, values in (one.get("results") or {}).items():
        if QUALITY[1](values.get("acc,none")):
            accuracy = {ACCURACY: ACCURACY.scale * values["acc,none"]}
            yield accuracy, name, int((one.get("num_samples") or {}).get(name) or 0), "questions"


def _method(row: Row, one: Row) -> str:
    """The title of its method. Where a method has a choice that makes it another one, with that, unless it is ours."""
    name = one.get("method", row.get("method"))
    options = name if isinstance(name, dict) else {}
    name = options.get("method") if isinstance(name, dict) else name
    recipe = row.get("recipe")
    if recipe == "dense" or name == "dense":
        return "dense"
    if name is None:
        if recipe is None:
            return "dense" if one.get("mode") == "dense" else "unnamed method"
        name = "lte"
    title = TITLES.get(str(name), str(name))
    if options.get("selection", "mlp") not in ("mlp", "threshold"):
        title += f", {str(options['selection']).replace('_', '-')}"
    if options.get("pattern"):
        title += f", {options['pattern']}"
    if options.get("activation") and name != "relufication":
        title += f", {options['activation']}"
    return f"{title}, paper's recipe" if recipe == "paper" else title
