"""``lte report``: rows of results, and what a model's routers do on a text, as one page without a network."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated

import tyro

from lte import __version__
from lte.cli.console import err, out
from lte.cli.main import parse
from lte.cli.options import DeviceOptions, open_model
from lte.evaluation.record import SUMMARY
from lte.files import write_whole
from lte.report.curves import gather
from lte.report.page import PageHead, html, markdown, pngs
from lte.report.results import Results, read_results
from lte.report.routing import Routing, routing_on
from lte.report.sections import sections
from lte.surgery.conversion import conversion_of
from lte.surgery.loading import load_config, load_tokenizer
from lte.surgery.method import Method
from lte.training.sweep_rows import ROWS

FORMATS = ("html", "md", "png")


@dataclass
class Report:
    output: Annotated[str, tyro.conf.arg(aliases=("-o",))]
    """File to write, e.g. report.html. Other formats go beside it: report.md, report-NAME.png."""
    results: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RESULTS")] = ()
    """Results files (.jsonl, or the .json of one run), folders of lte sweep or lte train."""
    format: str = "html"
    """html, md, png, or several: html,md,png."""
    metric: str | None = None
    """By what to draw and compare where an evaluation has several metrics: f1, bleu. By default ROUGE-L, accuracy, or
    Pearson's correlation."""
    title: str = "Learn To be Efficient: results"
    """Of the page."""
    model: str | None = None
    """A sparse model whose routers to look at on --text: a local folder or a hub id."""
    before: str | None = None
    """The same model before it was trained (as lte sparsify leaves it), for its router scores."""
    text: str | None = None
    """A file of text for --model to read."""
    max_tokens: int = 256
    """Tokens of the text to read at most."""
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options: Report = parse(Report, "report", argv)
    formats, stem = _outputs(options)
    _check(options)
    results = read_results(_files(options.results)) if options.results else Results()
    if not (results.measurements or results.benches or results.failures or options.model):
        raise ValueError(
            f"none of the {results.others} rows is a result of lte train, eval, sweep or bench: "
            "give files with the rows that these print with --json or write"
        )
    metrics = dict.fromkeys(metric.name for one in results.measurements for metric in one.qualities)
    if options.metric not in (None, *metrics):
        raise ValueError(f"metric is {options.metric!r}, but these results have: {', '.join(metrics) or 'none'}")
    comparisons = gather(results.measurements, options.metric)
    routing = before = None
    if options.model and options.text:
        text = Path(options.text).read_text(encoding="utf-8")
        routing = _route(options, options.model, text)
        if options.before:
            before = _route(options, options.before, text)
    parts = sections(results, comparisons, routing, before)
    head = _head(options, results)
    pictures = pngs(parts, stem) if "png" in formats else {}
    written = list(pictures.values())
    if "html" in formats:
        write_whole(stem.with_name(f"{stem.name}.html"), html(head, parts, routing))
        written.insert(0, f"{stem.name}.html")
    if "md" in formats:
        write_whole(stem.with_name(f"{stem.name}.md"), markdown(head, parts, pictures))
        written.append(f"{stem.name}.md")
    for run, reason in results.failures:
        err.print(f"failed run: {run}: {reason}", markup=False, soft_wrap=True)
    out.print(f"wrote {', '.join(written)} to {stem.parent}", markup=False, soft_wrap=True)


def _outputs(options: Report) -> tuple[list[str], Path]:
    """The formats, and the output without its ending."""
    formats = [one.strip() for one in options.format.split(",") if one.strip()]
    unknown = [one for one in formats if one not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"format is {options.format!r}, but it is one or several of {', '.join(FORMATS)}: html,md")
    path = Path(options.output)
    if path.is_dir() or options.output.endswith("/"):
        raise ValueError(f"output {options.output} is a folder: name a file in it, e.g. {path / 'report.html'}")
    if path.suffix.lstrip(".") not in formats:
        raise ValueError(f"output is {options.output}, but the format asked for ends in .{formats[0]}")
    if not path.parent.is_dir():
        raise ValueError(f"output is {options.output}, but there is no folder {path.parent}: make it first")
    return formats, path.with_suffix("")


def _check(options: Report) -> None:
    if not options.results and options.model is None:
        raise ValueError("nothing to report: give results files, folders of lte sweep, or --model DIR --text FILE")
    if (options.model is None) != (options.text is None):
        raise ValueError("--model and --text go together: the model reads the text")
    if options.before is not None and options.model is None:
        raise ValueError("--before is compared with --model: give that too, and --text FILE")
    if options.max_tokens < 1:
        raise ValueError(f"max_tokens is {options.max_tokens}: give at least 1")
    if options.text is not None and not Path(options.text).is_file():
        raise FileNotFoundError(f"{options.text}: no such file for --text")
    for name in filter(None, (options.model, options.before)):
        if not isinstance(conversion_of(load_config(name, options.where.trust_remote_code)), Method):
            raise ValueError(f"{name} has no routers: give a model that lte train or sparsify has made")


def _files(sources: Sequence[str]) -> list[Path]:
    """The files of results that files and folders stand for."""
    found = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = [path / name for name in (ROWS, SUMMARY) if (path / name).is_file()]
            if not inside:
                raise ValueError(f"{source} has no {ROWS} or {SUMMARY}: give a folder of lte sweep or lte train")
            found.append(inside[0])
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"{source}: no such file or folder")
    return found


def _route(options: Report, name: str, text: str) -> Routing:
    device, dtype = options.where.resolve()
    model = open_model(name, "own", device, dtype, options.where.trust_remote_code)
    with err.status("reading the text"):
        return routing_on(model, load_tokenizer(name, options.where.trust_remote_code), text, options.max_tokens)


def _head(options: Report, results: Results) -> PageHead:
    lines = [f"{counted}; from {', '.join(options.results)}."] if (counted := results.counted()) else []
    if options.model:
        before = f", before: {options.before}" if options.before else ""
        lines.append(f"Routers of {options.model}{before}, on {options.text}.")
    return PageHead(options.title, (*lines, f"Made by lte {__version__} on {date.today().isoformat()}."))
