"""Charts as SVG inside a page, or as PNG. Text of an SVG remains text and has the page's colour."""

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
"""The colour of text and axes. In a page it becomes the page's text colour, dark or light."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
"""The colours of Okabe and Ito, for colour-blind readers. Black and yellow are left out: some pages hide them."""

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
    """The text of each mark of a chart, by the id of the mark. The page shows it under the pointer."""

    texts: dict[str, str] = field(default_factory=dict)

    def add(self, text: str) -> str:
        """Keep the text and return an id for its mark."""
        gid = f"note{len(self.texts)}"
        self.texts[gid] = text
        return gid


@dataclass(frozen=True)
class Chart:
    """A chart that can be drawn many times.

    Attributes:
        slug: part of its file name and of the ids inside.
        caption: its content in one sentence.
        summary: the same for readers who cannot see it, with its main numbers.
        draw: a function that draws on axes and adds the texts of marks to notes.
        size: in inches, without the part that ``legend_below`` adds. It is narrow, so that text is readable on a phone.
    """

    slug: str
    caption: str
    summary: str
    draw: Callable[[Any, Notes], None]
    size: tuple[float, float] = (4.0, 2.7)

    def svg(self) -> str:
        """Return an ``<svg>`` element that loads nothing."""
        with self.drawn() as (figure, notes):
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return _inline(buffer.getvalue(), self.slug, self.summary, notes)

    def png(self, path: Path) -> None:
        """Write the chart as a PNG file on white."""
        with self.drawn() as (figure, _), whole_file(path) as fresh:
            figure.savefig(fresh, dpi=160, facecolor="white")

    @contextmanager
    def drawn(self) -> Iterator[tuple[Any, Notes]]:
        """Return a context with the figure and the texts of its marks."""
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
    """Add a legend and a note below the plot. The figure grows, so the plot keeps its size.

    The legend has at most ``columns`` columns, fewer if they do not fit. ``more`` are handles besides those of the
    axes' labels.
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
