"""The trade-off charts with many methods and budgets: what they look like, and what is beyond them."""

from itertools import pairwise

import pytest

from lte.report.charts import beyond_chart, tradeoff
from lte.report.curves import gather
from lte.report.looks import OURS, budgets_of, looks_of
from lte.report.results import TITLES, read_results
from result_rows import row, write

METHODS = ("lte", "deja-vu", "moefication", "relufication", "cats", "teal", "wanda", "topk-moe", "sigma-moe", "mine")


@pytest.fixture
def comparison(tmp_path):
    return lambda *rows: gather(read_results([write(tmp_path / "rows.jsonl", list(rows))]).measurements)[0]


def many(methods=METHODS, budgets=(0, 300, 600, 1200)):
    """Two runs of each method with each budget, all of them good."""
    return [
        row(method, 11 + s + index / 9, s, 0.2 - s / 10, steps=steps, options=f"--max-steps {steps}")
        for index, method in enumerate(methods)
        for steps in budgets
        for s in (0.3, 0.5)
    ]


def drawn(comparison, by="gflops", see=lambda figure: figure):
    with tradeoff(comparison, by, looks_of([comparison])).drawn() as (figure, _):
        figure.canvas.draw()
        return see(figure)


def plot_inches(figure):
    box = figure.axes[0].get_window_extent()
    return box.width / figure.dpi, box.height / figure.dpi


@pytest.mark.parametrize("by", ["sparsity", "gflops"])
def test_the_plot_has_one_size_for_any_number_of_curves(comparison, by):
    few = comparison(row("dense", 11), *many(METHODS[:1], (300,)))
    several = comparison(row("dense", 11), *many())
    long = comparison(row("dense", 11), *many(), *(row(f"a method with a name {n * 9}", 90, 0.5) for n in range(8)))
    assert [len(one.curves) for one in (few, several, long)] == [1, 40, 48]
    sizes = [drawn(one, by, plot_inches) for one in (few, several, long)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    assert sizes[2] == pytest.approx(sizes[0], rel=0.02)
    assert min(sizes[0]) > 2
    heights = [drawn(one, by, lambda figure: figure.get_figheight()) for one in (few, several, long)]
    assert heights == sorted(heights)


@pytest.mark.parametrize("worst", [11.2, 14, 22, 40, 800])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("scale", [1, 0.05])
def test_labels_do_not_overlap_and_all_is_inside(comparison, worst, dense, scale):
    rows = [*many(), row("cats", worst, 0.9, 0.07), row("cats", (worst * 11) ** 0.5, 0.8, 0.08)]
    rows += [row("dense", 11)] if dense else []
    for one in rows:
        one["evaluation"]["gflops_per_token"] *= scale

    def see(figure):
        axes, whole = figure.axes[0], figure.bbox
        for axis, ends in ((axes.xaxis, lambda box: (box.x0, box.x1)), (axes.yaxis, lambda box: (box.y0, box.y1))):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            extents = sorted(ends(tick.label1.get_window_extent()) for tick in ticks)
            assert len(extents) > 1
            assert all(before[1] < after[0] for before, after in pairwise(extents))
        (legend,) = figure.legends
        beneath = axes.xaxis.label.get_window_extent().y0
        assert legend.get_window_extent().y1 < beneath
        for one in (legend, axes.yaxis.label, *(text for text in figure.texts if text.get_text())):
            box = one.get_window_extent()
            assert whole.x0 <= box.x0 < box.x1 <= whole.x1
            assert whole.y0 <= box.y0 < box.y1 <= whole.y1

    drawn(comparison(*rows), see=see)


def test_ten_methods_look_different_and_lte_like_none_of_them(comparison):
    found = comparison(row("dense", 11), *many(), row("lte", 12, 0.5) | {"recipe": "paper"})
    looks = looks_of([found])
    assert len(looks) == len(METHODS) + 1
    assert len({(look.color, look.marker) for look in looks.values()}) == len(looks)
    ours = {title: look for title, look in looks.items() if look.color == OURS}
    assert list(ours) == ["LTE", "LTE, paper's schedule"]
    others = [look for title, look in looks.items() if title not in ours]
    for what in ("linewidth", "zorder"):
        assert min(look.line[what] for look in ours.values()) > max(look.line[what] for look in others)


def test_a_method_looks_alike_in_every_chart_and_with_every_budget(comparison):
    one, other = comparison(row("dense", 11), *many()), comparison(*many(METHODS[::-1], (300,)))
    looks = looks_of([one, other])
    assert {curve.method for curve in one.curves + other.curves} == set(looks)
    labels = drawn(one, see=lambda figure: [text.get_text() for text in figure.legends[0].texts])
    assert labels == [
        *(TITLES.get(name, name) for name in METHODS),
        "dense",
        "1,200 steps",
        "600 steps",
        "300 steps",
        "without training",
    ]


def test_budgets_differ_in_line_and_fill(comparison):
    found = comparison(*many(), row("another", 12, 0.5, steps=600))
    budgets = budgets_of(found)
    assert len({(str(one.line), one.fill) for one in budgets.values()}) == len(budgets) == 4
    assert (budgets[600].line, budgets[600].fill) == ("-", "full")  # of most curves
    assert (budgets[0].line, budgets[0].fill) == (":", "none")
    (only,) = budgets_of(comparison(*many(METHODS, (0,)))).values()
    assert (only.line, only.fill) == ("-", "full")  # nothing to tell apart


def test_runs_beyond_the_chart_are_named_and_pointed_at(comparison):
    found = comparison(
        row("dense", 10),
        row("lte", 12, 0.5, 0.12),
        row("cats", 13, 0.5, 0.12),
        row("cats", 20, 0.7, 0.1),  # just twice dense
        row("static-pruning", 42.71, 0.5, 0.1236),
        row("static-pruning", 140, 0.7, 0.094),
    )
    assert [point.value for point in beyond_chart(found)] == [42.71, 140]

    def see(figure):
        axes = figure.axes[0]
        arrows = [line for line in axes.lines if line.get_transform() == axes.get_xaxis_transform()]
        at = sorted(float(line.get_xdata()[0]) for line in arrows if len(line.get_xdata()) == 1)
        return at, axes.get_xlim(), axes.get_ylim(), [text.get_text() for text in figure.texts]

    at, (left, right), (_, top), texts = drawn(found, see=see)
    assert at == [0.094, 0.1236]
    assert left < 0.094
    assert right > 0.1236
    assert 20 < top < 25
    assert " ".join(texts[0].split()) == "beyond the chart: static pruning (42.7 at 0.1236, 140.0 at 0.094)"
    assert "static pruning (42.7 at 50\N{NO-BREAK SPACE}%" in " ".join(drawn(found, "sparsity", see)[3])
    assert "static pruning" in tradeoff(found, "gflops", looks_of([found])).svg()


def test_of_many_runs_those_far_from_most_are_beyond(comparison):
    good = [row("lte", 10.1 + 0.05 * n, 0.3 + n / 20) for n in range(10)]  # three quarters lose 0.55 at most
    many = [row("cats", 11 + n, 0.5 + n / 10) for n in range(3)]
    assert beyond_chart(comparison(row("dense", 10), *good[:8], *many)) == []
    assert [point.value for point in beyond_chart(comparison(row("dense", 10), *good, *many))] == [12, 13]


def test_of_accuracy_less_than_85_percent_of_dense_is_beyond(comparison):
    rows = [row("dense", 0.8, metric="accuracy")]
    rows += [
        row("lte", value, s, metric="accuracy") for value, s in ((0.78, 0.3), (0.7, 0.5), (0.68, 0.6), (0.67, 0.7))
    ]
    found = comparison(*rows)
    assert [point.value for point in beyond_chart(found)] == [67]
    bottom = drawn(found, see=lambda figure: figure.axes[0].get_ylim()[0])
    assert 66 < bottom < 68


def test_where_most_runs_are_bad_or_none_is_dense_the_chart_shows_them(comparison):
    bad = [row("cats", 90 + s, s) for s in (0.3, 0.5, 0.7)]
    assert [point.value for point in beyond_chart(comparison(row("dense", 10), *bad))] == [90.7]
    assert beyond_chart(comparison(*bad, row("lte", 12, 0.5))) == []
    assert beyond_chart(comparison(row("dense", 10), row("cats", 90, 0.5))) == []
