"""Whether LTE leads: its quality against every rival's, at equal GFLOPs per token and no more steps of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lte.report.curves import Comparison, Point, unbeaten
from lte.report.metrics import Metric

FROM_SPARSITY = 0.45
"""Rivals are compared from 50 % asked for; what is measured of it can be a little less."""


@dataclass(frozen=True)
class Duel:
    """A rival's run beside LTE at the same GFLOPs; ``lte`` is None where LTE has no run to compare with.

    LTE's are those of no more steps than the rival's, and all of them where the rival was set without training.
    """

    title: str
    rival: Point
    lte: float | None
    leads: bool


def at_cost(points: Sequence[Point], gflops: float, metric: Metric) -> float | None:
    """Quality at a cost, between points by a straight line; above the dearest the best; below the cheapest None."""
    ordered = sorted(points, key=lambda point: point.gflops)
    if not ordered or gflops < ordered[0].gflops:
        return None
    for left, right in pairwise(ordered):
        if left.gflops <= gflops <= right.gflops:
            share = (gflops - left.gflops) / ((right.gflops - left.gflops) or 1)
            return left.value + share * (right.value - left.value)
    return min((point.value for point in ordered), key=lambda value: metric.loss(value, 0.0))


def duels(comparison: Comparison) -> list[Duel]:
    """LTE's best runs against each run of every rival from 50 % up."""
    ours = [point for curve in comparison.curves for point in curve.points if point.method == "LTE"]
    if not ours:
        return []
    found = []
    for curve in comparison.curves:
        for point in curve.front:
            if point.method.startswith("LTE") or point.sparsity < FROM_SPARSITY:
                continue
            fair = [one for one in ours if not point.steps or 0 < one.steps <= point.steps]
            lte = at_cost(unbeaten(fair, comparison.metric), point.gflops, comparison.metric)
            leads = lte is not None and comparison.metric.loss(lte, point.value) < 0
            found.append(Duel(curve.title, point, lte, leads))
    return found
