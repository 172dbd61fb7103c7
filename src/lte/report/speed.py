"""The section on speed: lines of ``lte bench`` as charts and tables."""

from collections.abc import Sequence
from typing import Any

from lte.evaluation.result_row import ResultRow
from lte.report.drawing import INK, MARKERS, PALETTE, Chart, Notes, legend_below
from lte.report.layout import Section, TextTable


def latency(benches: Sequence[ResultRow]) -> Section:
    """Return the section with the measurements of ``lte bench``."""
    charts = tuple(chart for number, bench in enumerate(benches, 1) if (chart := speed_chart(bench, number)))
    tables = []
    for part, caption, columns in _BENCHES:
        rows = tuple(
            (
                *(_value(row.get(name)) for name in columns.values()),
                str(bench.get("device", "")),
                str(bench.get("commit")),
            )
            for bench in benches
            if bench["bench"] == part
            for row in bench["rows"]
            if "error" not in row
        )
        if rows:
            tables.append(TextTable(caption, (*columns, "device", "commit"), rows, folded=len(rows) > 12))
    text = ("Measured by lte bench, routing included, dense and sparse in the same run.",)
    return Section("latency", "Speed", text, charts, tables=tuple(tables))


_BENCHES = (
    ("decode", "Decoding a whole model", {
        "model": "shape", "batch": "batch", "sparsity": "sparsity", "dense, ms a token": "dense_ms",
        "sparse, ms a token": "lte_ms", "speed-up": "speedup", "ideal": "ideal_speedup", "dense by": "dense_by",
    }),
    ("train", "A training step", {
        "model": "shape", "schedule": "variant", "batch": "batch", "length": "sequence_length",
        "dense, ms": "dense_ms", "LTE, ms": "lte_ms", "ratio": "ratio",
    }),
    ("ffn", "One FFN", {
        "model": "shape", "tokens": "tokens", "sparsity": "sparsity", "union sparsity": "union_sparsity",
        "dense, us": "dense_us", "sparse, us": "lte_us", "speed-up": "speedup", "ideal": "ideal_speedup",
        "dense by": "dense_by",
    }),
)  # fmt: skip


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:#.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def speed_chart(bench: ResultRow, number: int) -> Chart | None:
    """Return a chart of the speed-up of one FFN over measured sparsity, a line for each number of tokens.

    The speed-up that the bytes alone would allow is dotted. None for other benchmarks, and for less than two
    sparsities.
    """
    rows = [row for row in bench["rows"] if {"speedup", "tokens", "sparsity_asked"} <= row.keys()]
    if len({row["sparsity_asked"] for row in rows}) < 2:
        return None
    lines = sorted({(row["tokens"], row.get("dtype") or "") for row in rows})
    dtypes = {dtype for _, dtype in lines}

    def draw(axes: Any, notes: Notes) -> None:
        from matplotlib.ticker import FuncFormatter, NullLocator

        for index, (count, dtype) in enumerate(lines):
            line = [row for row in rows if (row["tokens"], row.get("dtype") or "") == (count, dtype)]
            line.sort(key=lambda row: row["sparsity"])
            color, name = PALETTE[index % len(PALETTE)], f"{count}, {dtype}" if len(dtypes) > 1 else str(count)
            share = [100 * row["sparsity"] for row in line]
            axes.plot(share, [row["ideal_speedup"] for row in line], ":", color=color, alpha=0.7, linewidth=1)
            axes.plot(share, [row["speedup"] for row in line], color=color, marker=MARKERS[index % 12], label=name)
            for row in line:
                (mark,) = axes.plot(100 * row["sparsity"], row["speedup"], MARKERS[index % 12], color=color)
                mark.set_gid(notes.add(f"tokens {name}, {row['sparsity']:.0%} sparse: {row['speedup']:.2f}x"))
        axes.axhline(1, color=INK, linestyle="--", linewidth=1.2, label="dense")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.set(xlabel="sparsity, %", ylabel="speed-up over dense")
        axes.grid()
        legend_below(axes, columns=4 if len(dtypes) == 1 else 2, title="tokens at once")

    best = max(rows, key=lambda row: row["speedup"])
    where = f"{best.get('shape', 'an FFN')}, {bench.get('device', 'unknown device')}"
    caption = f"one FFN of {where}, {' and '.join(sorted(dtypes))}; dotted: what the bytes read would allow"
    return Chart(
        f"speed-{number}",
        caption,
        f"{caption}. Fastest: {best['speedup']:.2f} times dense at {best['sparsity']:.0%} with {best['tokens']} tokens",
        draw,
        (4.0, 2.8),
    )
