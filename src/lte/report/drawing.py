"""Charts as SVG that sits inside a page, or as PNG: text stays text, and takes the page's colour."""

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from lte.files import whole_file

INK = "#102030"
"""Text and axes. In a page it becomes the page's own colour, dark or light."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
"""Okabe and Ito's, told apart by the colour-blind; without the black and yellow that a dark or light page swallows."""

MARKERS = "osD^vPX*<>ph"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold any character, also $
    "svg.hashsalt": "lte",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass
class Notes:
    """What a chart says where it is pointed at: the id of a mark and its text."""

    texts: dict[str, str] = field(default_factory=dict)

    def add(self, text: str) -> str:
        """An id for a mark with that text."""
        gid = f"note{len(self.texts)}"
        self.texts[gid] = text
        return gid


@dataclass(frozen=True)
class Chart:
    """A chart that can be drawn as often as it is needed.

    Attributes:
        slug: part of its file name and of the ids inside.
        caption: what it shows, in one sentence.
        summary: the same for those who cannot see it, with its main numbers.
        draw: draws on axes, and notes what its marks say.
        size: in inches, without what ``legend_below`` adds. Narrow, so that a phone need not shrink its text much.
    """

    slug: str
    caption: str
    summary: str
    draw: Callable[[Any, Notes], None]
    size: tuple[float, float] = (4.0, 2.7)

    def svg(self) -> str:
        """An ``<svg>`` element without anything from outside."""
        with self.drawn() as (figure, notes):
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return _inline(buffer.getvalue(), self.slug, self.summary, notes)

    def png(self, path: Path) -> None:
        """Write it on white."""
        with self.drawn() as (figure, _), whole_file(path) as fresh:
            figure.savefig(fresh, dpi=160, facecolor="white")

    @contextmanager
    def drawn(self) -> Iterator[tuple[Any, Notes]]:
        """The figure, and what its marks say."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a character that the font does not have is drawn as a box
            figure, notes = Figure(figsize=self.size, layout="constrained"), Notes()
            FigureCanvasAgg(figure)
            self.draw(figure.subplots(), notes)
            yield figure, notes


def legend_below(
    axes: Any, columns: int = 2, title: str | None = None, more: Sequence[Any] = (), note: str = ""
) -> None:
    """What the lines are and a note, in room that is added below: the plot keeps its size, however much there is.

    ``columns`` at most, as many as fit; ``more`` handles than those of the axes' own labels.
    """
    figure = axes.figure
    (width, height), renderer = figure.get_size_inches(), figure.canvas.get_renderer()
    inches = {"transform": figure.dpi_scale_trans, "in_layout": False}
    text = figure.text(0.1, 0.08, textwrap.fill(note, 62), fontsize=8.5, va="bottom", **inches)
    below = text.get_window_extent(renderer).height / figure.dpi + 0.12 if note else 0.0
    handles = [*axes.get_legend_handles_labels()[0], *more]
    for count in range(min(columns, len(handles)), 0, -1):
        legend = figure.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, below), bbox_transform=figure.dpi_scale_trans,
            ncols=count, handlelength=2.5, handletextpad=0.6, title=title, alignment="left", columnspacing=1,
        )  # fmt: skip
        legend.set_in_layout(False)
        if legend.get_window_extent(renderer).width < 0.97 * width * figure.dpi or count == 1:
            below += legend.get_window_extent(renderer).height / figure.dpi + 0.06
            break
        legend.remove()
    figure.set_figheight(height + below)
    figure.get_layout_engine().set(rect=(0, below / (height + below), 1, height / (height + below)))


def _inline(svg: str, slug: str, summary: str, notes: Notes) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    for gid, text in notes.texts.items():
        svg = svg.replace(f'<g id="{gid}">', f'<g id="{gid}" class="mark"><title>{escape(text)}</title>')
    svg = re.sub(r'\bid="', f'id="{slug}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{slug}-", svg)
    svg = svg.replace(INK, "currentColor").replace(INK.lower(), "currentColor")
    head, _, rest = svg.partition(">")
    width = re.search(r'viewBox="0 0 ([\d.]+) ', head)
    assert width
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    label = f'role="img" aria-label="{escape(summary)}" style="max-width:{float(width[1]) * 5 / 3:.0f}px"'
    return f"{head} {label}>{rest}"
