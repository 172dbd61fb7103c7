"""Pictures: the course of training and the sparsity of each layer, and the speed of a sparse model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lte.files import whole_file


def plot_training(
    logs: Sequence[dict[str, Any]],
    layer_sparsity: Sequence[float],
    target: float,
    path: Path,
    baseline: Sequence[dict[str, Any]] = (),
) -> None:
    """Write a PNG: losses and sparsity over the steps, and sparsity by layer.

    Args:
        logs: ``trainer.state.log_history`` of an LTE run.
        layer_sparsity: measured sparsity of each layer.
        target: the sparsity that was asked for.
        path: the file to write.
        baseline: the logs of a dense run, whose loss is drawn too.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [entry for entry in logs if "loss" in entry]
    sparse = [entry for entry in steps if "sparsity" in entry]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, course, layers = figure.subplots(1, 3)
    dense = [(entry["step"], entry["loss"]) for entry in steps if "sparsity" not in entry]
    rival = [(entry["step"], entry["loss"]) for entry in baseline if "loss" in entry]
    if rival:
        losses.plot(*zip(*rival, strict=True), color="tab:orange", alpha=0.6, label="dense run")
    if dense:
        losses.plot(*zip(*dense, strict=True), color="tab:gray", label="dense stage")
    losses.plot([e["step"] for e in sparse], [e["task_loss"] for e in sparse], label="soft and hard stage")
    losses.set(title="task loss", xlabel="step")
    losses.legend(loc="upper right")
    course.plot([e["step"] for e in sparse], [e["sparsity"] for e in sparse], label="sparsity (training text)")
    course.axhline(target, color="tab:gray", linestyle="--", label="target")
    course.set(title="sparsity", xlabel="step", ylim=(0, 1))
    course.legend(loc="upper left")
    layers.bar(range(len(layer_sparsity)), layer_sparsity)
    layers.axhline(target, color="tab:gray", linestyle="--")
    layers.set(title="sparsity by layer (held-out text)", xlabel="layer", ylim=(0, 1))
    with whole_file(path) as fresh:
        figure.savefig(fresh, dpi=120)


def plot_speed(rows: Sequence[dict[str, Any]], by: str, path: Path, title: str) -> None:
    """Write a PNG: speed-up over measured sparsity, one line for each value of ``by``. The ideal is dotted.

    Args:
        rows: rows of ``lte bench``. Rows with an error are left out.
        by: the key whose values get a line each, for example ``"tokens"``.
        path: the file to write.
        title: the title of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    good = [row for row in rows if "error" not in row]
    dtypes = sorted({row["dtype"] for row in good})
    figure = Figure(figsize=(7 * max(1, len(dtypes)), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)
    for axes, dtype in zip(figure.subplots(1, max(1, len(dtypes)), squeeze=False)[0], dtypes, strict=False):
        for index, value in enumerate(sorted({row[by] for row in good if row["dtype"] == dtype})):
            line = sorted((r for r in good if r["dtype"] == dtype and r[by] == value), key=lambda r: r["sparsity"])
            share, color = [100 * r["sparsity"] for r in line], f"C{index}"
            axes.plot(share, [r["speedup"] for r in line], "o-", color=color, label=f"{by} {value}")
            axes.plot(share, [r["ideal_speedup"] for r in line], ":", color=color, alpha=0.6)
        axes.axhline(1, color="tab:gray", linestyle="--", label="dense")
        axes.set(title=f"{dtype} (dotted: ideal from bytes)", xlabel="sparsity, %", ylabel="speed-up over dense")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}x")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with whole_file(path) as fresh:
        figure.savefig(fresh, dpi=120)
