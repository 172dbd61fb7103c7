"""The charts of results: quality against sparsity and against cost, sparsity by layer."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lte.report.curves import Comparison, Curve, Point
from lte.report.drawing import INK, Chart, Notes, legend_below
from lte.report.looks import BudgetLook, Look, budgets_of

ARROW = ((-0.1, -1), (0.1, -1), (0.1, 0), (0.45, 0), (0, 1), (-0.45, 0), (-0.1, 0), (-0.1, -1))
"""An arrow upward, for runs beyond the chart."""
_MANY = 12  # with so many runs, quartiles mean something


def slug(text: str) -> str:
    """Return the text as a part of a file name or an id."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")


def in_words(point: Point, comparison: Comparison, title: str) -> str:
    """Return one point in words."""
    spread = f" ± {point.spread:.2g} over {point.seeds} seeds" if point.spread is not None else ""
    quality = f"{comparison.metric.title.split(',')[0]} {point.value:.4g}{spread}"
    return f"{title}: {quality}, {point.sparsity:.1%} sparse, {point.gflops:.4g} GFLOPs per token"


def tradeoff(comparison: Comparison, by: str, looks: Mapping[str, Look]) -> Chart:
    """Return a chart of quality against ``sparsity`` or ``gflops``. Dense is a line. Runs beyond it are arrows."""
    label = "sparsity of FFN neurons, %" if by == "sparsity" else "GFLOPs per token"
    beyond, budgets = beyond_chart(comparison), budgets_of(comparison)

    def draw(axes: Any, notes: Notes) -> None:
        drawn = sorted(comparison.curves, key=lambda curve: not looks[curve.method].ours)
        for curve in drawn:
            look, budget = looks[curve.method], budgets[curve.steps]
            front = sorted(curve.front, key=lambda point: _x(point, by))
            axes.plot([_x(one, by) for one in front], [one.value for one in front], ls=budget.line, **look.line)
            for point in curve.points:
                if point in beyond:
                    mark = _arrow(axes, point, by, look, comparison.metric.lower)
                else:
                    mark = _mark(axes, point, by, look, budget, point in curve.front)
                mark.set_gid(notes.add(in_words(point, comparison, curve.title)))
        for method in dict.fromkeys(curve.method for curve in drawn):
            axes.plot([], [], marker=looks[method].marker, label=method, **looks[method].line)
        if comparison.dense is not None:
            line = axes.axhline(comparison.dense.value, color=INK, linestyle=(0, (5, 3)), linewidth=1.2, label="dense")
            line.set_gid(notes.add(in_words(comparison.dense, comparison, "dense")))
            if comparison.dense.spread is not None:
                value, spread = comparison.dense.value, comparison.dense.spread
                axes.axhspan(value - spread, value + spread, color=INK, alpha=0.1, linewidth=0)
            if by == "gflops":
                (mark,) = axes.plot(comparison.dense.gflops, comparison.dense.value, "s", color=INK, markersize=6)
                mark.set_gid(notes.add(in_words(comparison.dense, comparison, "dense")))
        if by == "sparsity":
            axes.set_xlim(left=min(0, *axes.get_xlim()))
        _scale(axes, comparison, beyond)
        better = " (less is better)" if comparison.metric.lower else ""
        axes.set(xlabel=label, ylabel=comparison.metric.title + better)
        axes.grid()
        several = [budgets[steps].handle() for steps in sorted(budgets, reverse=True)] if len(budgets) > 1 else []
        legend_below(axes, more=several, note=_named(comparison, by, beyond))

    best = [in_words(point, comparison, curve.title) for curve in comparison.curves for point in curve.front]
    dense = [in_words(comparison.dense, comparison, "dense")] if comparison.dense else []
    return Chart(
        f"{slug(comparison.heading)}-{slug(comparison.metric.name)}-{by}",
        f"{comparison.metric.title.split(',')[0]} against {'sparsity' if by == 'sparsity' else 'GFLOPs per token'}",
        ". ".join([f"{comparison.metric.title} against {label}", *dense, *best]),
        draw,
        (4.0, 2.9),
    )


def beyond_chart(comparison: Comparison) -> list[Point]:
    """Return runs that are too bad for the chart, because they would make all others look alike.

    These are runs with more than twice dense's perplexity, or less than 85 % of its quality. If there are many runs, a
    run is also too bad if it loses more than twice the upper quartile of losses. At least half of the runs remain.
    """
    points = [point for curve in comparison.curves for point in curve.points]
    if comparison.dense is None or comparison.dense.value <= 0:
        return []
    worst = comparison.dense.value * (2 if comparison.metric.lower else 0.85)
    losses = [comparison.metric.loss(point.value, comparison.dense.value) for point in points]
    allowed = comparison.metric.loss(worst, comparison.dense.value)
    if len(losses) >= _MANY:
        allowed = min(allowed, 2 * statistics.quantiles(losses)[2])
    allowed = max(allowed, statistics.median_low(losses))
    return [point for point, loss in zip(points, losses, strict=True) if loss > allowed]


def _named(comparison: Comparison, by: str, beyond: Sequence[Point]) -> str:
    """Return the runs beyond the chart in words."""
    where = "{0.value:.1f} at {1:.3g}\N{NO-BREAK SPACE}%" if by == "sparsity" else "{0.value:.1f} at {1:.4g}"
    several = [
        f"{curve.title} ({', '.join(where.format(point, _x(point, by)) for point in curve.points if point in beyond)})"
        for curve in comparison.curves
        if any(point in beyond for point in curve.points)
    ]
    return f"beyond the chart: {'; '.join(several)}" if several else ""


def _x(point: Point, by: str) -> float:
    return 100 * point.sparsity if by == "sparsity" else point.gflops


def _mark(axes: Any, point: Point, by: str, look: Look, budget: BudgetLook, best: bool) -> Any:
    """Draw a run. It is small and faint if another run of its curve is better and cheaper."""
    (mark,) = axes.plot(
        _x(point, by), point.value, **look.line | {"linestyle": "", "linewidth": 0},
        marker=look.marker, markersize=(7 if best else 4.5) + look.ours, alpha=1 if best else 0.55,
        fillstyle=budget.fill, markerfacecoloralt="none",
    )  # fmt: skip
    if point.spread is not None:
        bar = look.line | {"linestyle": "", "elinewidth": 1.2}
        axes.errorbar(_x(point, by), point.value, point.spread, capsize=3, **bar)
    return mark


def _arrow(axes: Any, point: Point, by: str, look: Look, up: bool) -> Any:
    """Draw a run beyond the chart, at its edge."""
    shape = [(x, y if up else -y) for x, y in ARROW]
    where = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    (mark,) = axes.plot(
        _x(point, by), 0.965 if up else 0.035, marker=shape, markersize=11, color=look.color, linestyle="",
        markeredgewidth=0, zorder=5, **where,
    )  # fmt: skip
    return mark


def _scale(axes: Any, comparison: Comparison, beyond: Sequence[Point]) -> None:
    """Set the scales. Perplexities that are far apart get a logarithmic scale with plain numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    points = [point for curve in comparison.curves for point in curve.points if point not in beyond]
    values = [point.value for point in points]
    values += [comparison.dense.value] if comparison.dense else []
    low, high = min(values), max(values)
    if comparison.metric.lower and low > 0 and high > 2.5 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, high * 1.1)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_yticks(_log_ticks(low / 1.1, high * 1.1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        room = 0.1 * (high - low) or 1
        lowest = [point.value - (point.spread or 0) for point in points]
        highest = [point.value + (point.spread or 0) for point in points]
        axes.set_ylim(min(low, *lowest) - room, max(high, *highest) + room)
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))


def _log_ticks(low: float, high: float) -> list[float]:
    """Return plain numbers, the most whose labels fit."""
    ticks: list[float] = []
    for bases in ((1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 4, 6, 8), (1, 2, 5), (1, 3), (1,)):
        ticks = [base * 10**power for power in range(-2, 7) for base in bases if low <= base * 10**power <= high]
        if all(math.log(b / a) > 0.07 * math.log(high / low) for a, b in pairwise(ticks)):
            break
    return ticks


def layers_chart(comparison: Comparison, curve: Curve) -> Chart | None:
    """Return a chart of sparsity by layer: a row for each of some of the best runs. None if rows do not have it."""
    title, points = curve.title, _apart(curve.front, comparison)
    if not points:
        return None
    longest = max(len(point.layer_sparsity) for point in points)

    def draw(axes: Any, notes: Notes) -> None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        scale = ScalarMappable(Normalize(0, 1), "viridis")
        for row, point in enumerate(points):
            cells = axes.pcolormesh(
                range(len(point.layer_sparsity) + 1),
                [row, row + 0.55],
                [point.layer_sparsity],
                cmap=scale.cmap,
                norm=scale.norm,
                edgecolors="face",
                linewidth=0.2,
            )
            text = f"{point.sparsity:.1%}: {min(point.layer_sparsity):.2f} to {max(point.layer_sparsity):.2f}"
            cells.set_gid(notes.add(f"{title}, {text}"))
            axes.text(0, row - 0.07, text, fontsize=9.5)
        axes.set(xlim=(0, longest), ylim=(len(points) - 0.35, -0.45), xlabel="layer", yticks=[])
        axes.spines["left"].set_visible(False)
        bar = axes.figure.colorbar(scale, ax=axes, location="bottom", label="sparsity", aspect=40, pad=0.02)
        bar.outline.set_visible(False)

    text = [f"{point.sparsity:.1%}: {', '.join(f'{one:.2f}' for one in point.layer_sparsity)}" for point in points]
    return Chart(
        f"{slug(comparison.heading)}-{slug(comparison.metric.name)}-layers-{slug(title)}",
        f"{title}, {comparison.heading}",
        ". ".join([f"sparsity by layer of {title}", *text]),
        draw,
        (4.0, 1.4 + 0.48 * len(points)),
    )


def _apart(points: Sequence[Point], comparison: Comparison) -> list[Point]:
    """Return the best points with layers that differ by three points of sparsity or more from each other."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: comparison.metric.loss(one.value, 0.0)):
        if len(point.layer_sparsity) > 1 and all(abs(point.sparsity - one.sparsity) >= 0.03 for one in kept):
            kept.append(point)
    return sorted(kept, key=lambda one: one.sparsity)
