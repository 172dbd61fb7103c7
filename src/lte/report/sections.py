"""The report's sections: text, charts, tables. Page, Markdown and pictures have the same ones."""

from collections.abc import Sequence
from itertools import chain

from lte.report.charts import layers_chart, tradeoff
from lte.report.curves import Comparison
from lte.report.layout import Section, TextTable
from lte.report.looks import looks_of
from lte.report.originals import scores
from lte.report.results import Results
from lte.report.routing import Routing, union_by_batch
from lte.report.routing_view import MOST_EXPERTS, score_chart, union_chart
from lte.report.speed import latency
from lte.report.table1 import CITATION, PAPER_TASKS, Cheapest, table_one
from lte.report.verdict import duels


def sections(
    results: Results, comparisons: Sequence[Comparison], routing: Routing | None = None, before: Routing | None = None
) -> list[Section]:
    """Return all sections that are not empty, in the order of the page."""
    found = [_tradeoff(comparison, comparisons, number) for number, comparison in enumerate(comparisons, 1)]
    found += scores(results.measurements)
    if comparisons:
        found.append(_table_one(comparisons))
        found += _layers(comparisons)
    if routing is not None:
        found += _routing(routing, before)
    if results.benches:
        found.append(latency(results.benches))
    if results.failures:
        rows = tuple(results.failures)
        text = (f"Runs that did not end well: {len(rows)}. They are in no chart.",)
        found.append(Section("failed", "Failed runs", text, tables=(TextTable("Failed runs", ("run", "error"), rows),)))
    return found


def _layers(comparisons: Sequence[Comparison]) -> list[Section]:
    """Return a section with LTE's charts; the page shows charts of other methods on demand."""
    charts = [
        (curve, chart)
        for comparison in comparisons
        for curve in comparison.curves
        if (chart := layers_chart(comparison, curve))
    ]
    different = {chart.summary: (curve, chart) for curve, chart in charts}  # several of lm_eval's tasks
    ours = tuple(chart for curve, chart in different.values() if curve.title.startswith("LTE"))
    others = tuple(chart for curve, chart in different.values() if not curve.title.startswith("LTE"))
    text = (
        "Some of the best runs of each curve above: their sparsity, and their least and most sparse layer. A bright "
        "layer leaves most of its neurons idle.",
    )
    return [Section("layers", "Sparsity by layer", text, ours or others, others if ours else ())] if charts else []


def _tradeoff(comparison: Comparison, comparisons: Sequence[Comparison], number: int) -> Section:
    looks = looks_of(comparisons)
    text = []
    if comparison.curves:
        text.append(
            f"{comparison.count:,} {comparison.unit}. A line joins a method's best runs: no other run of the "
            "method beats them in both quality and cost. Small marks are its other runs."
        )
    if any(point.spread is not None for curve in comparison.curves for point in curve.points):
        text.append(
            "Where a setting was run with several seeds, its mark is the mean and its bar one standard deviation."
        )
    else:
        text.append("Every setting was run with one seed, so small differences mean nothing.")
    if others := [metric.title.split(",")[0] for metric in comparison.others]:
        text.append(f"The table of all numbers has {' and '.join(others)} as well.")
    text += _beyond_ffn(comparison)
    if comparison.repeated:
        text.append(f"{comparison.repeated} earlier runs of a command and seed that was run again are left out.")
    met = duels(comparison)
    comparable = [one for one in met if one.lte is not None]
    warnings = [
        f"LTE does not lead: at {one.rival.gflops:.4g} GFLOPs per token {one.title} has {one.rival.value:.4g}, "
        f"LTE {one.lte:.4g}."
        for one in comparable
        if not one.leads
    ]
    for against, several in (
        (
            "At equal GFLOPs and no more steps of training, from 50 % sparsity up,",
            [d for d in comparable if d.rival.steps],
        ),
        ("Against methods that were set without training", [d for d in comparable if not d.rival.steps]),
    ):
        if several:
            text.append(f"{against} LTE leads in {sum(one.leads for one in several)} of {len(several)} places.")
    dearer = [f"{one.title} ({one.rival.gflops:.4g} GFLOPs per token)" for one in met if one.lte is None]
    if dearer:
        warnings.append(
            f"No LTE run with the same number of steps or fewer is as cheap as {', '.join(dearer)}: not compared."
        )
    if comparison.dense is None:
        warnings.append("No dense run is among these results, so the loss is not known.")
    name = comparison.metric.title.split(",")[0]
    return Section(
        f"task-{number}",
        f"{name[0].upper()}{name[1:]} on {comparison.heading}",
        tuple(text),
        tuple(tradeoff(comparison, by, looks) for by in ("sparsity", "gflops")) if comparison.curves else (),
        tables=(_numbers(comparison),),
        warnings=tuple(warnings),
    )


def _beyond_ffn(comparison: Comparison) -> list[str]:
    """Return sentences about methods whose sparsity is not that of FFNs alone."""
    points = [point for curve in comparison.curves for point in curve.points]
    methods = {
        what: list(dict.fromkeys(p.method for p in points if p.beyond_ffn == what)) for what in ("inputs", "weights")
    }
    text = []
    if methods["inputs"]:
        text.append(
            f"{', '.join(methods['inputs'])}: also sparse in attention. Sparsity does not count that, but GFLOPs do: "
            "compare by GFLOPs."
        )
    if methods["weights"]:
        text.append(
            f"{', '.join(methods['weights'])}: sparsity is the share of weights that are 0, also in attention. GFLOPs "
            "leave these weights out, as hardware that skips each of them would: compare by GFLOPs."
        )
    return text


def _numbers(comparison: Comparison) -> TextTable:
    compared = "over dense" if comparison.metric.lower else "against dense"
    points = [("dense", comparison.dense)] if comparison.dense else []
    points += [(curve.title, point) for curve in comparison.curves for point in curve.points]
    qualities = (comparison.metric.title, compared, *(metric.title for metric in comparison.others))
    header = ("run", *qualities, "seeds", "sparsity, %", "GFLOPs per token", "of dense", "options")
    options = [[*chain.from_iterable(point.setting)] for _, point in points]
    alike = [one for one in options[0] if all(one in others for others in options)] if len(points) > 1 else []
    rows = []
    for (title, point), all_of_them in zip(points, options, strict=True):
        over = ""
        if comparison.dense is not None:
            difference = point.value - comparison.dense.value
            over = f"{point.value / comparison.dense.value:.3f}x" if comparison.metric.lower else f"{difference:+.2f}"
        further = (_quality(*point.others.get(metric, (None, None))) for metric in comparison.others)
        numbers = (_quality(point.value, point.spread), over, *further, str(point.seeds), f"{100 * point.sparsity:.1f}")
        own = " ".join(one for one in all_of_them if one not in alike)
        rows.append((title, *numbers, f"{point.gflops:.4g}", f"{point.gflops / comparison.gflops_dense:.0%}", own))
    note = f"Options of all runs: {' '.join(alike)}" if alike else ""
    return TextTable("All numbers", header, tuple(rows), folded=True, note=note)


def _quality(value: float | None, spread: float | None) -> str:
    return ("" if value is None else f"{value:.2f}") + ("" if spread is None else f" ± {spread:.2g}")


def _table_one(comparisons: Sequence[Comparison]) -> Section:
    table = table_one(comparisons)
    ours = [f"{comparison.heading} ({_allowed(comparison)})" for comparison in table.comparisons]
    header = ("method", *(f"{name}, paper" for name in PAPER_TASKS), *(f"{name}, ours" for name in ours))
    rows = []
    for name, paper, choices in table.rows:
        cells = ("",) * 3 if paper is None else tuple("n/a" if one is None else f"{one:g}" for one in paper)
        rows.append((name, *cells, *map(_cell, choices)))
    return Section(
        "table-1",
        "Fewest GFLOPs within an allowed loss",
        (
            "GFLOPs per token (G = 2^30; FFN, attention projections and routers, no LM head) of the cheapest run that "
            "loses no more than allowed against the best dense run. Paper: LLaMA-7B, at most 0.05 ROUGE-L or 0.5 "
            "perplexity lost. Ours are other, smaller models: compare the percentages of dense, not the numbers.",
            f"Paper's numbers: {CITATION}. n/a: none within the allowed loss; empty: not run.",
        ),
        tables=(TextTable("Table 1", header, tuple(rows)),),
    )


def _allowed(comparison: Comparison) -> str:
    unit = "" if comparison.metric.lower else " points"
    return f"{comparison.metric.title.split(',')[0]}, at most {comparison.metric.allowed:g}{unit} lost"


def _cell(choice: Cheapest | None) -> str:
    if choice is None:
        return ""
    if choice.point is None:
        return f"n/a (of {choice.tried} run{'s' if choice.tried > 1 else ''})"
    sparse = f" at {choice.point.sparsity:.0%} sparse" if choice.point.sparsity else ""
    return f"{choice.point.gflops:.4g} ({choice.share:.0%}){sparse}"


def _routing(routing: Routing, before: Routing | None) -> list[Section]:
    experts = routing.active[0].shape[1]
    seen = f"{len(routing.pieces)} tokens of the text, {len(routing.layers)} layers of {experts:,} experts"
    only_choose = all(share == 0 for share in routing.histogram_overall[1:-1])
    text = [f"{seen}, mode {routing.mode}; {routing.sparsity:.1%} of the experts were idle."]
    if only_choose:
        text.append("The routers of this method only choose: their scores are 0 or 1.")
    if before is not None:
        text.append(f"Before: the same text, in mode {before.mode}.")
    by_batch = union_by_batch(routing.active)
    rows = tuple(
        (str(batch), f"{100 * sum(layers) / len(layers):.1f}", f"{100 * min(layers):.1f}", f"{100 * max(layers):.1f}")
        for batch, layers in by_batch.items()
    )
    header = ("tokens together", "idle for all, %", "least sparse layer", "most sparse layer")
    scores = Section("scores", "Router scores", tuple(text), (score_chart(routing, before),))
    tokens = [
        "The stronger the colour of a token, the more experts it uses in the chosen layer. The scale goes from the "
        "fewest to the most experts of any token. Choose a token to see its experts."
    ]
    if experts > MOST_EXPERTS:
        tokens.append(
            f"A layer has {experts:,} experts: too many to show which ones are active, so only their number is shown."
        )
    union = Section(
        "union",
        "Union sparsity",
        (
            "Tokens that are decoded together share the experts that are read. An expert is skipped only if no token "
            "of the batch wants it. The numbers are means over all ways to draw a batch from the tokens of this text. "
            "The line by chance is for experts that are chosen independently for each token.",
        ),
        (union_chart(routing),),
        tables=(TextTable("Union sparsity", header, rows, folded=True),),
    )
    return [scores, Section("tokens", "Experts by token", tuple(tokens), tokens=True), union]
