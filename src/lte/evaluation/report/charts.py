"""The charts of results: quality against sparsity and against cost, sparsity by layer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lte.evaluation.report.curves import Curve, Point, Task
from lte.evaluation.report.drawing import INK, MARKERS, PALETTE, Chart, Notes, legend_below

Styles = Mapping[str, tuple[str, str]]


def styles_of(tasks: Sequence[Task]) -> Styles:
    """A colour and a marker for each curve's title, the same in every chart."""
    titles = dict.fromkeys(curve.title for task in tasks for curve in task.curves)
    return {title: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, title in enumerate(titles)}


def slug(text: str) -> str:
    """As a part of a file name or an id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def describe(point: Point, task: Task, title: str) -> str:
    """One point in words."""
    spread = f" ± {point.spread:.2g} over {point.seeds} seeds" if point.spread is not None else ""
    quality = f"{task.metric.title.split(',')[0]} {point.value:.4g}{spread}"
    return f"{title}: {quality}, {point.sparsity:.1%} sparse, {point.gflops:.4g} GFLOPs per token"


def tradeoff(task: Task, by: str, styles: Styles) -> Chart:
    """Quality against ``sparsity`` or ``gflops``; dense is a line across."""
    label = "sparsity of FFN neurons, %" if by == "sparsity" else "GFLOPs per token"

    def draw(axes: Any, notes: Notes) -> None:
        for curve in task.curves:
            color, marker = styles[curve.title]
            front = sorted(curve.front, key=lambda point: _x(point, by))
            axes.plot(*_xy(front, by), color=color, linewidth=1.6)
            axes.plot([], [], color=color, marker=marker, label=curve.title)
            for point in curve.points:
                best = point in curve.front
                (mark,) = axes.plot(
                    _x(point, by), point.value, marker, color=color,
                    markersize=7 if best else 5, markerfacecolor=color if best else "none", linestyle="",
                )  # fmt: skip
                mark.set_gid(notes.add(describe(point, task, curve.title)))
                if point.spread is not None:
                    axes.errorbar(_x(point, by), point.value, point.spread, color=color, capsize=3, linewidth=1.2)
        if task.dense is not None:
            line = axes.axhline(task.dense.value, color=INK, linestyle="--", linewidth=1.2, label="dense")
            line.set_gid(notes.add(describe(task.dense, task, "dense")))
            if task.dense.spread is not None:
                low, high = task.dense.value - task.dense.spread, task.dense.value + task.dense.spread
                axes.axhspan(low, high, color=INK, alpha=0.1, linewidth=0)
            if by == "gflops":
                (mark,) = axes.plot(task.dense.gflops, task.dense.value, "s", color=INK, markersize=6)
                mark.set_gid(notes.add(describe(task.dense, task, "dense")))
        if by == "sparsity":
            axes.set_xlim(left=min(0, *axes.get_xlim()))
        _scale(axes, task)
        axes.set(xlabel=label, ylabel=task.metric.title + (" (less is better)" if task.metric.lower else ""))
        axes.grid()
        legend_below(axes)

    best = [describe(point, task, curve.title) for curve in task.curves for point in curve.front]
    dense = [describe(task.dense, task, "dense")] if task.dense else []
    lines = -(-len(task.curves) // 2)
    return Chart(
        f"{slug(task.heading)}-{slug(task.metric.name)}-{by}",
        f"{task.metric.title.split(',')[0]} against {'sparsity' if by == 'sparsity' else 'GFLOPs per token'}",
        ". ".join([f"{task.metric.title} against {label}", *dense, *best]),
        draw,
        (4.0, 2.9 + 0.2 * lines),
    )


def _x(point: Point, by: str) -> float:
    return 100 * point.sparsity if by == "sparsity" else point.gflops


def _xy(points: Sequence[Point], by: str) -> tuple[list[float], list[float]]:
    return [_x(point, by) for point in points], [point.value for point in points]


def _scale(axes: Any, task: Task) -> None:
    """Perplexities that lie far apart on a logarithmic scale, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.margins(x=0.06)
    values = [point.value for curve in task.curves for point in curve.points]
    values += [task.dense.value] if task.dense else []
    low, high = min(values), max(values)
    if task.metric.lower and low > 0 and high > 2.5 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, high * 1.1)
        axes.yaxis.set_minor_locator(NullLocator())
        steps = [base * 10**power for power in range(-2, 7) for base in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)]
        axes.set_yticks([step for step in steps if low / 1.1 <= step <= high * 1.1])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        room = 0.1 * (high - low) or 1
        lowest = [point.value - (point.spread or 0) for curve in task.curves for point in curve.points]
        highest = [point.value + (point.spread or 0) for curve in task.curves for point in curve.points]
        axes.set_ylim(min(low, *lowest) - room, max(high, *highest) + room)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def layers_chart(task: Task, curve: Curve) -> Chart | None:
    """Sparsity of each layer: a row a run (some of the best), a column a layer. None where rows lack it."""
    title, points = curve.title, _apart(curve.front, task)
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
        f"{slug(task.heading)}-{slug(task.metric.name)}-layers-{slug(title)}",
        f"{title}, {task.heading}",
        ". ".join([f"sparsity by layer of {title}", *text]),
        draw,
        (4.0, 1.4 + 0.48 * len(points)),
    )


def _apart(points: Sequence[Point], task: Task) -> list[Point]:
    """Of points with layers, the best ones that are three points of sparsity or more from each other."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: task.metric.loss(one.value, 0.0)):
        if len(point.layer_sparsity) > 1 and all(abs(point.sparsity - one.sparsity) >= 0.03 for one in kept):
            kept.append(point)
    return sorted(kept, key=lambda one: one.sparsity)
