"""The report as files: one self-contained HTML page, Markdown, PNG charts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lte.report.layout import Section, TextTable
from lte.report.routing import Routing
from lte.report.routing_view import token_data

HERE = Path(__file__).parent


@dataclass(frozen=True)
class PageHead:
    """The title of the page, and the lines between it and the first section."""

    title: str
    lines: tuple[str, ...]


def html(head: PageHead, parts: Sequence[Section], routing: Routing | None) -> str:
    """Return an HTML page that loads no other file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    data = None if routing is None else _script_safe(token_data(routing))
    layers = () if routing is None else routing.layers
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    template = environment.get_template("page.html.jinja")
    return template.render(head=head, sections=parts, data=data, layers=layers, style=style, script=script)


def _script_safe(values: dict[str, Any]) -> str:
    """Return JSON that cannot end the script element around it."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def markdown(head: PageHead, parts: Sequence[Section], pictures: dict[str, str]) -> str:
    """Return the same in Markdown. ``pictures`` has the files of charts by slug; other charts are left out."""
    lines = [f"# {head.title}", "", *(f"{_escaped(line)}\n" for line in head.lines)]
    for part in parts:
        lines += [f"## {_escaped(part.title)}", ""]
        lines += [f"{_escaped(one)}\n" for one in part.text]
        lines += [f"**{_escaped(one)}**\n" for one in part.warnings]
        if part.tokens:
            lines.append("The coloured tokens are in the HTML report.\n")
        for chart in (*part.charts, *part.more):
            if chart.slug in pictures:
                lines.append(f"![{_escaped(chart.summary)}]({pictures[chart.slug]})\n")
        for table in part.tables:
            lines += [*_markdown_table(table), ""]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(table: TextTable) -> list[str]:
    note = ["", _escaped(table.note)] if table.note else []
    rows = [table.header, ("---",) * len(table.header), *table.rows]
    return [f"{_escaped(table.caption)}:", "", *(f"| {' | '.join(map(_escaped, row))} |" for row in rows), *note]


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def pngs(parts: Sequence[Section], stem: Path) -> dict[str, str]:
    """Write every chart as STEM-slug.png and return the names of the files by slug."""
    names = {}
    for part in parts:
        for chart in (*part.charts, *part.more):
            path = stem.with_name(f"{stem.name}-{chart.slug}.png")
            chart.png(path)
            names[chart.slug] = path.name
    return names
