"""Means, spreads, fronts, Table 1 and the verdict, against numbers worked out by hand."""

import pytest

from lte.report.curves import Point, gather
from lte.report.results import METRICS, read_results
from lte.report.sections import sections
from lte.report.table1 import PAPER, table_one
from lte.report.verdict import at_cost, duels
from result_rows import row, write

(PERPLEXITY,) = (metric for metric in METRICS if metric.name == "perplexity")


@pytest.fixture
def comparisons(tmp_path):
    return lambda *rows, **by: gather(read_results([write(tmp_path / "rows.jsonl", list(rows))]).measurements, **by)


def points(comparison, title):
    (curve,) = (curve for curve in comparison.curves if curve.title == title)
    return curve.points


def test_mean_and_spread_over_seeds(comparisons):
    rows = [
        row("lte", value, 0.5, gflops, seed=seed)
        for seed, value, gflops in [(1, 12, 0.12), (2, 13, 0.12), (3, 17, 0.15)]
    ]
    (comparison,) = comparisons(*rows)
    (point,) = points(comparison, "LTE")
    assert point.seeds == 3
    assert point.value == pytest.approx(14)
    assert point.spread == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    assert point.gflops == pytest.approx(0.13)
    assert point.layer_sparsity == pytest.approx((0.4, 0.5, 0.6))


def test_what_differs_in_more_than_the_seed_is_another_point(comparisons):
    rows = [row("lte", 12, 0.5), row("lte", 13, 0.7), row("lte", 14, 0.5, options="--ramp 1")]
    (comparison,) = comparisons(*rows)
    assert [(point.value, point.seeds, point.spread) for point in points(comparison, "LTE")] == [
        (12, 1, None),
        (14, 1, None),
        (13, 1, None),
    ]


def test_of_a_run_repeated_with_its_seed_the_last_counts(comparisons):
    (comparison,) = comparisons(row("lte", 12, 0.5), row("lte", 11, 0.5))
    assert [point.value for point in points(comparison, "LTE")] == [11]
    assert comparison.repeated == 1


def test_a_model_measured_again_is_one_point(comparisons):
    again = row("lte", 12.1, 0.5)
    again["trained_by"], again["command"] = again["command"], "lte eval out --text wiki/test.txt --json"
    (comparison,) = comparisons(row("lte", 12, 0.5), again, row("cats", 13, 0.5, 0.15))
    assert [point.value for point in points(comparison, "LTE")] == [12.1]


def test_comparisons_are_told_apart_by_metric_data_and_size(comparisons):
    other_size = row("lte", 12, 0.5, options="--ramp 1")
    other_size["evaluation"]["gflops_per_token_dense"] = 0.4
    rows = [row("lte", 12, 0.5), row("lte", 0.8, 0.5, metric="accuracy"), row("lte", 12, 0.5, data="e2e/dev.csv")]
    found = comparisons(*rows, other_size)
    assert [(comparison.metric.name, comparison.title) for comparison in found] == [
        ("perplexity", "wiki/test (1,000 labels, dense 0.2 GFLOPs)"),
        ("accuracy", "wiki/test"),
        ("perplexity", "e2e/dev"),
        ("perplexity", "wiki/test (1,000 labels, dense 0.4 GFLOPs)"),
    ]


def test_metrics_of_one_evaluation_are_one_comparison(comparisons):
    rows = [row("lte", 0.5, 0.5, seed=seed, metric="accuracy") for seed in (1, 2)]
    for one, f1 in zip(rows, (0.6, 0.7), strict=True):
        one["evaluation"]["f1"] = f1
    rows += [row("cats", 0.5, 0.5, metric="accuracy"), row("cats", 0.5, 0.5, metric="pearson")]
    accuracy, pearson = comparisons(*rows)
    assert (accuracy.metric.name, pearson.metric.name) == ("accuracy", "pearson")
    lte, cats = (curve.points[0] for curve in accuracy.curves)
    assert (lte.value, cats.value, cats.others) == (50, 50, {})
    ((metric, (mean, spread)),) = lte.others.items()
    assert (metric.name, mean, spread) == ("f1", pytest.approx(65), pytest.approx(50**0.5))
    f1, *others = comparisons(*rows, metric="f1")
    assert (f1.metric.name, f1.curves[0].points[0].value) == ("f1", pytest.approx(65))
    assert [comparison.metric.name for comparison in others] == ["accuracy", "pearson"]  # of evaluations without F1


def test_a_row_that_names_no_data_belongs_where_all_else_fits(comparisons):
    bare = row("cats", 13, 0.5)
    del bare["command"]
    (comparison,) = comparisons(row("lte", 12, 0.5), bare)
    assert [curve.title for curve in comparison.curves] == ["LTE", "CATS"]


def test_budgets_are_curves_of_their_own_and_dense_is_the_best_dense(comparisons):
    rows = [row("lte", 14, 0.5), row("lte", 12, 0.5, steps=1200, options="--max-steps 1200")]
    (comparison,) = comparisons(*rows, row("dense", 11), row("dense", 10.5, options="--max-steps 9"))
    assert [curve.title for curve in comparison.curves] == ["LTE, 300 steps", "LTE, 1,200 steps"]
    assert comparison.dense is not None
    assert comparison.dense.value == 10.5


def test_the_front_is_what_no_other_beats_in_both(comparisons):
    rows = [
        row("lte", 12, 0.5, 0.12),
        row("lte", 13, 0.6, 0.11),
        row("lte", 14, 0.55, 0.115),
        row("lte", 12, 0.4, 0.14),
    ]
    (comparison,) = comparisons(*rows)
    assert [point.value for point in comparison.curves[0].points] == [12, 12, 14, 13]
    assert [(point.value, point.sparsity) for point in comparison.curves[0].front] == [(12, 0.5), (13, 0.6)]


def test_the_front_of_accuracy_is_upward(comparisons):
    rows = [row("lte", 0.8, 0.5, 0.12, metric="accuracy"), row("lte", 0.9, 0.4, 0.14, metric="accuracy")]
    rows += [row("lte", 0.7, 0.3, 0.16, metric="accuracy")]
    (comparison,) = comparisons(*rows)
    assert [point.value for point in comparison.curves[0].front] == pytest.approx([90, 80])


def test_table_one_takes_the_cheapest_within_the_allowed_loss(comparisons):
    found = comparisons(
        row("dense", 10),
        row("lte", 10.2, 0.3, 0.16),
        row("lte", 10.5, 0.5, 0.12),  # loses exactly what is allowed
        row("lte", 10.6, 0.7, 0.09),
        row("cats", 10.7, 0.3, 0.18),
    )
    table = table_one(found)
    rows = {name: (paper, choices) for name, paper, choices in table.rows}
    assert [name for name, _, _ in table.rows] == [*list(PAPER)[:-1], "CATS", "LTE"]
    assert rows["LTE"][0] == (5.38, 4.65, 6.59)
    (lte,), (cats,), (dense,), (deja_vu,) = (rows[name][1] for name in ("LTE", "CATS", "dense", "Deja Vu"))
    assert lte.point.sparsity == 0.5
    assert lte.share == pytest.approx(0.6)
    assert (cats.point, cats.tried) == (None, 1)
    assert dense.share == 1
    assert deja_vu is None


def test_table_one_of_rouge_allows_five_points(comparisons):
    rows = [row("dense", 60.0, metric="rougeL")]
    rows += [row("lte", value, s, 0.2 - 0.1 * s, metric="rougeL") for value, s in [(56, 0.5), (54.9, 0.7)]]
    (lte,) = table_one(comparisons(*rows)).rows[-1][2]
    assert lte.point.value == 56


def test_quality_at_a_cost():
    some = [Point("LTE", 1, "", 1, value, None, 0.5, gflops) for value, gflops in [(12.0, 0.1), (11.0, 0.2)]]
    assert at_cost(some, 0.15, PERPLEXITY) == pytest.approx(11.5)
    assert at_cost(some, 0.2, PERPLEXITY) == 11
    assert at_cost(some, 0.3, PERPLEXITY) == 11
    assert at_cost(some, 0.09, PERPLEXITY) is None
    assert at_cost([], 0.1, PERPLEXITY) is None


def test_seeds_of_models_with_other_layers_have_a_mean(comparisons):
    other = row("lte", 12, 0.5, 0.1, seed=2)
    other["evaluation"]["layer_sparsity"] = [0.5]
    (comparison,) = comparisons(row("dense", 10), row("lte", 11, 0.5, 0.1), other)
    assert [point.value for curve in comparison.curves for point in curve.points] == [11.5]


def test_where_lte_leads_and_where_not(comparisons):
    (comparison,) = comparisons(
        row("dense", 10),
        row("lte", 12, 0.5, 0.10),
        row("lte", 11, 0.3, 0.20),
        row("cats", 11.6, 0.5, 0.15),  # LTE: 11.5
        row("teal", 11.4, 0.5, 0.15),
        row("static-pruning", 15, 0.9, 0.05),  # LTE has none as cheap
        row("deja-vu", 10.5, 0.3, 0.15),  # below 50 %: not asked
    )
    found = {one.title: (one.lte, one.leads) for one in duels(comparison)}
    assert found == {
        "CATS": (pytest.approx(11.5), True),
        "TEAL": (pytest.approx(11.5), False),
        "static pruning": (None, False),
    }


def test_lte_trained_for_longer_does_not_count(comparisons):
    rivals = [row("cats", 10.6, 0.5, 0.15, steps=300), row("teal", 10.6, 0.5, 0.15, steps=0)]
    (comparison,) = comparisons(
        row("lte", 10.7, 0.5, 0.14, steps=300),
        row("lte", 10.5, 0.5, 0.14, steps=1200, options="--max-steps 1200"),
        *rivals,
    )
    assert {one.title: (one.lte, one.leads) for one in duels(comparison)} == {
        "CATS, 300 steps": (10.7, False),
        "TEAL": (10.5, True),  # set without training: any LTE, and the page says so
    }
    for steps in (1200, 0):  # 0: nobody knows
        (comparison,) = comparisons(row("lte", 10.5, 0.5, 0.14, steps=steps), rivals[0])
        assert [one.lte for one in duels(comparison)] == [None]


def test_as_it_was_set_and_fine_tuned_are_two_curves(comparisons):
    (comparison,) = comparisons(
        row("cats", 12, 0.5, steps=0, options="--fit"), row("cats", 11, 0.5), row("lte", 10, 0.5)
    )
    assert [curve.title for curve in comparison.curves] == ["CATS", "CATS, 300 steps", "LTE"]


def test_a_word_on_sparsity_that_is_not_of_ffns_alone(tmp_path):
    rows = [row("dense", 10), row("teal", 12, 0.5, 0.12), row("wanda", 11, 0.0, 0.1), row("lte", 11, 0.5, 0.1)]
    rows[1]["evaluation"]["attention_sparsity"] = 0.5
    rows[2]["evaluation"]["weight_sparsity"] = 0.5
    results = read_results([write(tmp_path / "rows.jsonl", rows)])
    text = sections(results, gather(results.measurements))[0].text
    assert [line.split(":")[0] for line in text if "compare by GFLOPs" in line] == ["TEAL", "Wanda"]


def test_options_that_all_runs_share_are_said_once(tmp_path):
    rows = [row("lte", 12, 0.5, 0.12, options="--ramp 1"), row("lte", 11, 0.3, 0.15)]
    results = read_results([write(tmp_path / "rows.jsonl", rows)])
    (table,) = sections(results, gather(results.measurements))[0].tables
    assert [one[-1] for one in table.rows] == ["--target-sparsity 0.3", "--target-sparsity 0.5 --ramp 1"]
    assert table.note == "Options of all runs: --method lte --model models/tiny --text t.txt --eval-text wiki/test.txt"


def test_the_page_says_where_lte_does_not_lead(tmp_path):
    rows = [row("dense", 10), row("lte", 12, 0.5, 0.12), row("teal", 11.4, 0.5, 0.12)]
    rows += [row("cats", 15, 0.6, 0.1), row("static-pruning", 16, 0.9, 0.05)]
    results = read_results([write(tmp_path / "rows.jsonl", rows)])
    first = sections(results, gather(results.measurements))[0]
    assert first.warnings == (
        "LTE does not lead: at 0.12 GFLOPs per token TEAL has 11.4, LTE 12.",
        "No LTE run with the same number of steps or fewer is as cheap as CATS (0.1 GFLOPs per token), "
        "static pruning (0.05 GFLOPs per token): not compared.",
    )
    assert any(line.endswith("LTE leads in 0 of 1 places.") for line in first.text)
