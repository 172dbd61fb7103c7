"""The look of curves: a colour and a marker for each method, a line and a fill for each training budget."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from lte.report.curves import Comparison
from lte.report.drawing import INK, MARKERS, PALETTE

OURS = PALETTE[1]
"""LTE's colour. No other method gets it."""

OTHERS = tuple(color for color in PALETTE if color != OURS)


@dataclass(frozen=True)
class Look:
    """The look of a method, the same in every chart of a page."""

    color: str
    marker: str
    ours: bool = False

    @property
    def line(self) -> dict[str, Any]:
        """The options of its lines. LTE's lines are thicker, and above all others."""
        return {"color": self.color, "linewidth": 2.6 if self.ours else 1.4, "zorder": 4 if self.ours else 3}


@dataclass(frozen=True)
class BudgetLook:
    """The look of a number of training steps in one comparison: line, fill of marks, and name in the legend."""

    line: Any
    fill: Any
    title: str

    def handle(self) -> Any:
        """Return a handle for the legend, without a method's colour."""
        from matplotlib.lines import Line2D

        return Line2D(
            [], [], color=INK, linestyle=self.line, linewidth=1.4, marker="o", fillstyle=self.fill,
            markerfacecoloralt="none", label=self.title,
        )  # fmt: skip


def looks_of(comparisons: Sequence[Comparison]) -> Mapping[str, Look]:
    """Return a look for each method. Variants ("Wanda, 2:4") have their method's colour and another marker."""
    methods = dict.fromkeys(curve.method for comparison in comparisons for curve in comparison.curves)
    colors = {"LTE": OURS}
    looks: dict[str, Look] = {"LTE": Look(OURS, MARKERS[0], True)}
    for index, method in enumerate(one for one in methods if one != "LTE"):
        family = method.split(", ")[0]
        color = colors.setdefault(family, OTHERS[(len(colors) - 1) % len(OTHERS)])
        markers = [MARKERS[1:][(index + more) % (len(MARKERS) - 1)] for more in range(len(MARKERS) - 1)]
        taken = [look.marker for look in looks.values() if look.color == color]
        marker = next((one for one in markers if one not in taken), markers[0])
        looks[method] = Look(color, marker, family == "LTE")
    return looks


def budgets_of(comparison: Comparison) -> Mapping[int, BudgetLook]:
    """Return looks by number of steps. The most frequent one has full lines and marks. 0 has dots and hollow marks."""
    curves = Counter(curve.steps for curve in comparison.curves)
    trained = sorted(filter(None, curves), key=lambda steps: (-curves[steps], -steps))
    kinds = [("-", "full"), ("--", "bottom"), ("-.", "left"), ((0, (6, 1, 1, 1, 1, 1)), "top")]
    budgets = {
        steps: BudgetLook(line, fill, f"{steps:,} steps")
        for steps, (line, fill) in zip(trained, cycle(kinds), strict=False)
    }
    if 0 in curves:
        budgets[0] = BudgetLook(":", "none", "without training") if trained else BudgetLook("-", "full", "")
    return budgets
