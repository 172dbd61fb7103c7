"""The verdict: LTE against every rival, at equal GFLOPs per token and no more steps of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lte.report.curves import Comparison, Point, unbeaten
from lte.report.metrics import Metric

FROM_SPARSITY = 0.45
"""Rivals count from a target of 50 % on. The measured sparsity can be a little less."""


@dataclass(frozen=True)
class Duel:
    """A rival's run and LTE at the same GFLOPs. ``lte`` is None if LTE has no run to compare with.

    LTE's runs have no more steps than the rival's. If the rival was set without training, all of them count.
    """

    title: str
    rival: Point
    lte: float | None
    leads: bool


def at_cost(points: Sequence[Point], gflops: float, metric: Metric) -> float | None:
    """Return the quality at a cost, on straight lines between points.

    It is None below the cheapest point, and the best quality of all above the most expensive one.
    """
    ordered = sorted(points, key=lambda point: point.gflops)
    if not ordered or gflops < ordered[0].gflops:
        return None
    for left, right in pairwise(ordered):
        if left.gflops <= gflops <= right.gflops:
            share = (gflops - left.gflops) / ((right.gflops - left.gflops) or 1)
            return left.value + share * (right.value - left.value)
    return min((point.value for point in ordered), key=lambda value: metric.loss(value, 0.0))


def duels(comparison: Comparison) -> list[Duel]:
    """Return a duel of LTE's best runs with each run of every rival from 50 % on."""
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
