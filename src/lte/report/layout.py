"""The parts of a report: sections with text, charts and tables."""

from dataclasses import dataclass

from lte.report.drawing import Chart


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are text. ``folded``: the page shows it on demand. ``note``: a line below the table."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the report. ``more``: charts that the page shows on demand. ``tokens``: it has the coloured tokens."""

    slug: str
    title: str
    text: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    more: tuple[Chart, ...] = ()
    tables: tuple[TextTable, ...] = ()
    warnings: tuple[str, ...] = ()
    tokens: bool = False
