"""Runs become points (mean and spread over seeds), and points become curves, one set for each comparison."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from lte.report.metrics import Metric
from lte.report.results import Measurement, Setting


@dataclass(frozen=True)
class Point:
    """One setting: means over its seeds, and the standard deviation of its quality if it has several seeds.

    ``others`` are mean and deviation by the metrics that the charts of its comparison do not show.
    """

    method: str
    steps: int
    setting: Setting
    seeds: int
    value: float
    spread: float | None
    sparsity: float
    gflops: float
    layer_sparsity: tuple[float, ...] = ()
    beyond_ffn: str = ""
    others: Mapping[Metric, tuple[float, float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """All points of one method with one budget.

    Attributes:
        title: the method's title, with its budget if the comparison has several.
        points: in order of sparsity.
        front: the points that no other point of the curve beats in both quality and cost.
    """

    title: str
    points: tuple[Point, ...]
    front: tuple[Point, ...]

    @property
    def method(self) -> str:
        """The method of all its points."""
        return self.points[0].method

    @property
    def steps(self) -> int:
        """The training steps of each of its points."""
        return self.points[0].steps


@dataclass(frozen=True)
class Comparison:
    """Runs that can be compared: the same metric on the same data by models of one size.

    Attributes:
        dense: the best dense point; None if no dense run is among the results.
        repeated: number of measurements that are left out, because the same command and seed was run again later.
    """

    metric: Metric
    title: str
    model: str
    count: int
    unit: str
    gflops_dense: float
    dense: Point | None
    curves: tuple[Curve, ...]
    repeated: int = 0

    @property
    def others(self) -> list[Metric]:
        """The other metrics of its runs."""
        points = [*filter(None, [self.dense]), *(point for curve in self.curves for point in curve.points)]
        return list(dict.fromkeys(metric for point in points for metric in point.others))

    @property
    def heading(self) -> str:
        """The data and the model, if the rows name them."""
        return ", ".join(filter(None, [self.title, self.model])) or f"{self.count:,} {self.unit} of unnamed data"


def gather(measurements: Iterable[Measurement], metric: str | None = None) -> list[Comparison]:
    """Sort measurements into comparisons, in the same order. Each is by this metric, or by its first one."""
    groups: dict[tuple, list[Measurement]] = {}
    for one in measurements:
        shown = next((each for each in one.qualities if each.name == metric), next(iter(one.qualities)))
        groups.setdefault((shown, one.count, round(one.gflops_dense, 6), one.task), []).append(one)
    for key in [key for key in groups if not key[3]]:  # rows that name no data belong to the only data that fits
        fitting = [other for other in groups if other[:3] == key[:3] and other[3]]
        if len(fitting) == 1:
            groups[fitting[0]] += groups.pop(key)
    comparisons = [_comparison(key[3], several, key[0]) for key, several in groups.items()]
    named = Counter((comparison.metric.name, comparison.heading) for comparison in comparisons)
    return [
        _told_apart(comparison) if named[comparison.metric.name, comparison.heading] > 1 else comparison
        for comparison in comparisons
    ]


def _told_apart(comparison: Comparison) -> Comparison:
    """Return the comparison with a title that names its size and its dense cost, to tell it from others."""
    more = f"{comparison.count:,} {comparison.unit}, dense {comparison.gflops_dense:.6g} GFLOPs"
    return replace(comparison, title=f"{comparison.title} ({more})".strip())


def _comparison(title: str, measurements: Sequence[Measurement], metric: Metric) -> Comparison:
    points, repeated = average(measurements, metric)
    dense = [point for point in points if point.method == "dense"]
    rivals = [point for point in points if point.method != "dense"]
    budgets = {point.steps for point in rivals if point.steps}
    both = {point.method for point in rivals if not point.steps}  # as they were set, and fine-tuned
    by_curve: dict[str, list[Point]] = {}
    for point in rivals:
        budget = f", {point.steps:,} steps" if point.steps and (len(budgets) > 1 or point.method in both) else ""
        by_curve.setdefault(point.method + budget, []).append(point)
    names = sorted(
        {one.model for one in measurements if one.model and one.method == "dense"}
        or {one.model for one in measurements if one.model}
    )
    return Comparison(
        metric=metric,
        title=title,
        model=", ".join(names),
        count=measurements[0].count,
        unit=measurements[0].unit,
        gflops_dense=measurements[0].gflops_dense,
        dense=min(dense, key=lambda point: metric.loss(point.value, 0.0), default=None),
        curves=tuple(_curve(name, several, metric) for name, several in by_curve.items()),
        repeated=repeated,
    )


def average(measurements: Sequence[Measurement], metric: Metric) -> tuple[list[Point], int]:
    """Return a point for each setting, and how many measurements are left out: of repeated runs the last one counts."""
    settings: dict[tuple[str, tuple[str, ...], Setting], dict[tuple[int | None, ...], Measurement]] = {}
    same = {(one.method, one.run, one.seed, round(one.sparsity, 4), one.steps): one for one in measurements}
    for index, one in enumerate(same.values()):  # by training and once more by lte eval, the last counts
        # a row that does not say how it was made is its own
        setting = one.setting if any(one.setting) else ((f"run {index + 1}",),)
        settings.setdefault((one.method, one.data, setting), {})[one.seed] = replace(one, setting=setting)
    kept = sum(map(len, settings.values()))
    return [_point(list(by_seed.values()), metric) for by_seed in settings.values()], len(measurements) - kept


def _point(runs: Sequence[Measurement], metric: Metric) -> Point:
    def mean(name: str) -> float:
        return statistics.mean(map(attrgetter(name), runs))

    qualities = {each: _mean_and_spread(runs, each) for each in dict.fromkeys(m for one in runs for m in one.qualities)}
    value, spread = qualities.pop(metric)
    layers = [one.layer_sparsity for one in runs if len(one.layer_sparsity) == len(runs[0].layer_sparsity)]
    return Point(
        method=runs[0].method,
        steps=runs[0].steps,
        setting=runs[0].setting,
        seeds=len(runs),
        value=value,
        spread=spread,
        sparsity=mean("sparsity"),
        gflops=mean("gflops"),
        beyond_ffn=runs[0].beyond_ffn,
        others=qualities,
        layer_sparsity=tuple(map(statistics.mean, zip(*layers, strict=True))),
    )


def _mean_and_spread(runs: Sequence[Measurement], metric: Metric) -> tuple[float, float | None]:
    values = [one.qualities[metric] for one in runs if metric in one.qualities]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def _curve(title: str, points: Sequence[Point], metric: Metric) -> Curve:
    ordered = sorted(points, key=lambda point: point.sparsity)
    return Curve(title, tuple(ordered), tuple(unbeaten(ordered, metric)))


def unbeaten(points: Sequence[Point], metric: Metric) -> list[Point]:
    """Return the points that no other beats: none is as good and as cheap, and better in one of the two."""
    rated = [(metric.loss(point.value, 0.0), point.gflops) for point in points]

    def beaten(one: tuple[float, float]) -> bool:
        return any(other[0] <= one[0] and other[1] <= one[1] and other != one for other in rated)

    return [point for point, rating in zip(points, rated, strict=True) if not beaten(rating)]
