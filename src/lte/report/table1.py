"""The paper's Table 1 in the same form: the fewest GFLOPs per token within an allowed loss of quality."""

from collections.abc import Sequence
from dataclasses import dataclass

from lte.report.curves import Comparison, Point

CITATION = (
    "Zheng, Bai, Liu, Mao, Chen, Lai, Prakash: Learn To be Efficient: Build Structured Sparsity in Large Language "
    "Models. NeurIPS 2024, arXiv 2402.06126, Table 1"
)
PAPER_TASKS = ("XSum", "E2E", "WikiText-103")
PAPER: dict[str, tuple[float | None, ...]] = {
    "dense": (12.06, 12.06, 12.06),
    "Deja Vu": (7.92, 6.42, 7.92),
    "MoEfication": (10.45, None, None),
    "ReluLLaMA + MoEfication": (8.27, 7.39, 11.1),
    "LTE": (5.38, 4.65, 6.59),
}
"""GFLOPs per token of LLaMA-7B; None: no run of the method was within the allowed loss."""


@dataclass(frozen=True)
class Cheapest:
    """The cheapest point of one method in one comparison that is within the allowed loss; None if no point is."""

    point: Point | None
    tried: int
    gflops_dense: float

    @property
    def share(self) -> float:
        """GFLOPs as a share of the dense model's."""
        assert self.point is not None
        return self.point.gflops / self.gflops_dense


@dataclass(frozen=True)
class TableOne:
    """Our numbers and the paper's: a row for each method, ``None`` if it was not run or is not in the paper."""

    comparisons: tuple[Comparison, ...]
    rows: tuple[tuple[str, tuple[float | None, ...] | None, tuple[Cheapest | None, ...]], ...]


_ROUNDING = 1e-9  # for a loss that is exactly the allowed one


def cheapest_within(comparison: Comparison, method: str) -> Cheapest | None:
    """Return the cheapest run of ``method`` within the allowed loss of the best dense run; None if it was not run."""
    metric = comparison.metric
    if comparison.dense is None or metric.allowed is None:
        return None
    dense = comparison.dense
    if method == "dense":
        return Cheapest(dense, 1, comparison.gflops_dense)
    points = [point for curve in comparison.curves for point in curve.points if point.method == method]
    within = [point for point in points if metric.loss(point.value, dense.value) <= metric.allowed + _ROUNDING]
    cheapest = min(within, key=lambda point: point.gflops, default=None)
    return Cheapest(cheapest, len(points), comparison.gflops_dense) if points else None


def table_one(comparisons: Sequence[Comparison]) -> TableOne:
    """Return every method of the paper and the results, in all comparisons with a dense run and an allowed loss."""
    usable = tuple(
        comparison
        for comparison in comparisons
        if comparison.dense is not None and comparison.metric.allowed is not None
    )
    ours = [point.method for comparison in usable for curve in comparison.curves for point in curve.points]
    names = sorted(dict.fromkeys([*PAPER, *ours]), key=lambda name: name.startswith("LTE"))  # LTE last, as in the paper
    rows = tuple(
        (name, PAPER.get(name), tuple(cheapest_within(comparison, name) for comparison in usable)) for name in names
    )
    return TableOne(usable, rows)
