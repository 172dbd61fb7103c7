"""A row is checked when it is read: a field of another type is named, and none ends in a traceback."""

import copy
import json

import pytest

from lte.report.curves import gather
from lte.report.page import PageHead, html, markdown
from lte.report.results import read_results
from lte.report.sections import sections
from result_rows import bench, row, write

NUMBERS = (True, -1, 0, 10**400, float("nan"), float("inf"))
ODD = (None, *NUMBERS, "text", "$\\frac$", "\x00\x1b", [], [None], ["a"], {}, {"a": []})


def good():
    one = row("lte", 10.4, 0.5, 0.12) | {"trained_by": "lte train", "model": "m", "run": {"seed": "1"}}
    tasks = {"results": {"arc": {"acc,none": 0.5}}, "num_samples": {"arc": 10}, "num_prompts": 3}
    one["method"] = {"method": "moefication", "selection": "oracle", "activation": "relu", "pattern": "2:4"}
    one["evaluation"] |= {"attention_sparsity": 0.1, "rougeL": 20.0, "method": "lte", "weight_sparsity": 0.0}
    evaluated = one["evaluation"] | tasks
    made = {"command": "lte train", "model": "m", "data": ["t.txt"], "options": {"ramp": 0.5, "columns": ["a", "b"]}}
    said = {"made": [made], "measured": {"kind": "held out", "data": ["t.txt"], "options": {"max_rows": 3}}}
    rows = [one | {"evals": [evaluated]}, evaluated | {"command": "lte eval m"}, bench(), one | said, evaluated | said]
    rows.append(bench() | {"bench": "ffn"})
    return json.loads(json.dumps(rows))  # nothing is in two places


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inside, (*path, key))


def changed(rows, path, odd):
    rows = copy.deepcopy(rows)
    *above, last = path
    inside = rows
    for key in above:
        inside = inside[key]
    inside[last] = odd
    return rows


def report_of(path):
    results = read_results([path])
    parts = sections(results, gather(results.measurements, None))
    head = PageHead("title", ("line",))
    return html(head, parts, None) + markdown(head, parts, {})


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:20])
def test_any_field_may_be_anything(tmp_path, odd):
    rows, refused, drawn = good(), 0, 0
    for path in [*places(rows)][1:]:
        file = write(tmp_path / "rows.jsonl", changed(rows, path, odd))
        says = complaint(file)
        if says:
            assert says.startswith(f"{file} line {path[0] + 1}"), says
            refused += 1
            continue
        drawn += 1
        results = read_results([file])
        assert sections(results, gather(results.measurements, None))
    assert refused + drawn > 100
    assert drawn


def complaint(file):
    """What reading says of a file; empty where it is taken."""
    try:
        read_results([file])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": "one"}, 'line 2: the field seed is "one", but it has to be a whole number'),
        ({"steps": {"soft": "many"}}, "the field steps is .*, but it has to be an object, each value a number of 0"),
        ({"evaluation": {"sparsity": 1.5}}, "the field sparsity is 1.5, but it has to be a number from 0 to 1"),
        ({"evaluation": {"perplexity": "low"}}, 'perplexity is "low", but it has to be a number'),
        (
            {"evaluation": {"layer_sparsity": [0.5, None]}},
            "layer_sparsity is .*, but it has to be a list, each a",
        ),
        ({"method": {"method": "lte", "expert_size": [8]}}, "whose options are single values"),
        ({"evaluation": []}, "the field evaluation is .., but it has to be an object"),
        (
            {"made": [{}, {"data": "t.txt"}]},
            'line 2, part 2 of made: the field data is "t.txt", but it has to be a list',
        ),
        ({"measured": {"options": []}}, r"line 2, measured: the field options is \[\], but it has to be an object"),
        ({"measured": {"kind": "guess"}}, 'the field kind is "guess", but it has to be one of data, held out, MMLU'),
        ({"evals": [{"mode": 3}]}, "line 2, evaluation 1 of evals: the field mode is 3, but it has to be a text"),
    ],
)
def test_the_field_is_named(tmp_path, change, says):
    file = write(tmp_path / "rows.jsonl", [row("lte", 10.0), row("lte", 11.0) | change])
    with pytest.raises(ValueError, match=says):
        read_results([file])


def test_a_row_of_a_bench_is_named(tmp_path):
    line = bench()
    line["rows"][1]["speedup"] = "fast"
    with pytest.raises(ValueError, match=r'line 1, row 2: the field speedup is "fast", but it has to be a'):
        read_results([write(tmp_path / "rows.jsonl", [line])])


def test_a_bench_without_a_name_is_read(tmp_path):
    (found,) = read_results([write(tmp_path / "rows.jsonl", [bench() | {"command": "lte bench  "}])]).benches
    assert found["bench"] == ""


def test_the_summary_of_a_training_run_has_an_evaluation(tmp_path):
    whole = row("lte", 10.0)
    assert len(read_results([write(tmp_path / "lte_training.json", [whole])]).measurements) == 1
    whole["ewaluation"] = whole.pop("evaluation")
    with pytest.raises(ValueError, match=r"lte_training.json has no evaluation: run lte eval .* --json"):
        read_results([write(tmp_path / "lte_training.json", [whole])])


def test_rows_of_others_may_hold_anything(tmp_path):
    others = [{"seed": [], "steps": "x"}, {"rows": 3, "command": "make"}, {"results": [1]}]
    assert read_results([write(tmp_path / "rows.jsonl", [row("lte", 10.0), *others])]).others == 3


def test_a_run_whose_sparsity_is_not_a_number_has_failed(tmp_path):
    diverged = row("lte", 12.0)
    diverged["evaluation"]["sparsity"] = float("nan")
    found = read_results([write(tmp_path / "rows.jsonl", [row("lte", 10.0), diverged])])
    assert len(found.measurements) == 1
    assert [reason for _, reason in found.failures] == ["sparsity is nan"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": "\xff"}', "is not UTF-8 text"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        (b'{"model": "\\ud800"}', "line 1 holds half a character"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, content, says):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"rows.jsonl {says}"):
        read_results([tmp_path / "rows.jsonl"])


NAMES = (r"$\frac$ $$ %s {0} \\", "<script>", "_\x00\n\u202e", "x" * 500)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_only_a_name(tmp_path, name):
    one = row(name, 10.4, 0.5, 0.12) | {"model": name}
    other = bench() | {"device": name}
    for inside in other["rows"]:
        inside |= {"shape": name, "dtype": name}
    mine = row("lte", 10.2, 0.4, 0.15)
    mine["command"] = mine["command"].replace("wiki/test.txt", json.dumps(name))
    file = write(tmp_path / "rows.jsonl", [row("dense", 10), one, mine, other, {"command": name, "error": name}])
    page = report_of(file)
    assert "<script>" not in page.split("<main", 1)[-1].split("<script", 1)[0] or name != "<script>"
    results = read_results([file])
    for section in sections(results, gather(results.measurements, None)):
        for number, chart in enumerate(section.charts):
            chart.png(tmp_path / f"{number}.png")


def test_speed_is_drawn_with_any_title(tmp_path):
    from lte.report.plots import plot_speed

    plot_speed(bench()["rows"], "tokens", tmp_path / "speed.png", r"$\frac$")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
