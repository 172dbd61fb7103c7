"""A model's routing on the page: charts, and the data for the coloured tokens."""

import statistics
from typing import Any

from lte.report.drawing import INK, PALETTE, Chart, Notes, legend_below
from lte.report.routing import BINS, Routing, union_by_batch

MOST_EXPERTS = 512
"""If a layer has more experts, as with methods that choose single neurons, the page does not list the active ones."""


def score_chart(after: Routing, before: Routing | None) -> Chart:
    """Return a histogram of router scores, all layers together."""
    middles = [(index + 0.5) / BINS for index in range(BINS)]

    def draw(axes: Any, notes: Notes) -> None:
        after_share = [100 * share for share in after.histogram_overall]
        axes.bar(middles, after_share, 0.92 / BINS, color=PALETTE[0], alpha=0.75, label="after" if before else "scores")
        if before is not None:
            shares = [100 * share for share in before.histogram_overall]
            edges = [index / BINS for index in range(BINS + 1)]
            axes.stairs(shares, edges, color=PALETTE[1], linewidth=2, hatch="///", label="before")
        axes.axvline(after.tau, color=INK, linestyle="--", linewidth=1.2, label=f"tau = {after.tau:g}")
        axes.set(xlabel="router score", ylabel="share of scores, %", xlim=(0, 1))
        axes.grid(axis="y")
        legend_below(axes, columns=3)

    parts = [
        f"{name}: {sum(one.histogram_overall[: BINS // 2]):.0%} of scores below 0.5"
        for name, one in (("before", before), ("after", after))
        if one is not None
    ]
    return Chart("scores", "router scores, all layers and tokens", "; ".join(["router scores", *parts]), draw)


def union_chart(routing: Routing) -> Chart:
    """Return a chart of the sparsity that a batch of tokens has together, against the size of the batch."""
    by_batch = union_by_batch(routing.active)
    means = {batch: statistics.mean(layers) for batch, layers in by_batch.items()}
    alone = by_batch[1]

    def draw(axes: Any, notes: Notes) -> None:
        from matplotlib.ticker import NullLocator

        sizes = list(by_batch)
        low = [100 * min(layers) for layers in by_batch.values()]
        high = [100 * max(layers) for layers in by_batch.values()]
        axes.fill_between(sizes, low, high, color=PALETTE[0], alpha=0.15, linewidth=0, label="layers, least to most")
        chance = [100 * statistics.mean(one**batch for one in alone) for batch in sizes]
        axes.plot(sizes, chance, ":", color=PALETTE[1], label="if chosen by chance")
        axes.plot(sizes, [100 * one for one in means.values()], color=PALETTE[0], label="mean of layers")
        for batch, one in means.items():
            (mark,) = axes.plot(batch, 100 * one, "o", color=PALETTE[0])
            mark.set_gid(notes.add(f"batch of {batch}: {one:.1%} of experts idle"))
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="tokens decoded together", ylabel="experts idle for all of them, %", ylim=(0, 100))
        axes.grid()
        legend_below(axes)

    text = ", ".join(f"{one:.1%} for {batch}" for batch, one in means.items())
    return Chart("union", "union sparsity against batch size", f"share of experts idle for a whole batch: {text}", draw)


def token_data(routing: Routing) -> dict[str, Any]:
    """Return the data of the page's script: pieces, number of experts, and active experts of each token."""
    experts = [one.shape[1] for one in routing.active]
    listed = max(experts) <= MOST_EXPERTS
    return {
        "pieces": list(routing.pieces),
        "experts": experts,
        "counts": [one.sum(-1).tolist() for one in routing.active],
        "bits": [[_bits(row) for row in one.tolist()] for one in routing.active] if listed else None,
    }


def _bits(row: list[bool]) -> str:
    """Return the row as hexadecimal digits. The first expert is the highest bit of the first digit."""
    padded = "".join("1" if one else "0" for one in row) + "0" * (-len(row) % 4)
    return f"{int(padded, 2):0{len(padded) // 4}x}"
