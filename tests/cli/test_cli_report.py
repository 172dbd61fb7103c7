"""lte report: what it writes, and the one line it says of bad input."""

import re

import pytest

from lte.cli.main import main
from lte.report.results import METRICS
from result_rows import bench, row, write


@pytest.fixture
def rows(tmp_path):
    failed = {"run": {"seed": "9"}, "command": "lte train --seed 9", "error": "out of <memory>"}
    some = [row("dense", 10), row("lte", 10.4, 0.5, 0.12), row("cats", 11, 0.5, 0.15), failed, bench()]
    return str(write(tmp_path / "rows.jsonl", some))


def test_html_alone_holds_all(rows, tmp_path, capsys):
    assert main(["report", rows, "-o", str(tmp_path / "report.html")]) == 0
    said = capsys.readouterr()
    assert "report.html" in said.out
    assert "seed 9: out of <memory>" in said.err
    page = (tmp_path / "report.html").read_text()
    for text in ("Perplexity on wiki/test, tiny", "arXiv 2402.06126", "0.12 (60%) at 50% sparse", "Sparsity by layer"):
        assert text in page, text
    assert "out of &lt;memory&gt;" in page
    assert "lte bench ffn --shape tiny" in page  # its failed row
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page)
    assert set(re.findall(r"https?://[^\s\"')]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not {target for target in re.findall(r'(?:href="#|url\(#)([^")]+)', page)} - set(ids)


def test_all_formats(rows, tmp_path):
    assert main(["report", rows, "-o", str(tmp_path / "all.md"), "--format", "md,png,html"]) == 0
    text = (tmp_path / "all.md").read_text()
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 5  # two curves, two charts of layers, one of speed
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG"), name
    assert (tmp_path / "all.html").exists()
    widths = {line.count("|") for line in text.split("Table 1:")[1].split("\n\n")[1].splitlines()}
    assert len(widths) == 1
    assert "| LTE | 5.38 | 4.65 | 6.59 | 0.12 (60%) at 50% sparse |" in text


def test_a_name_with_dots(rows, tmp_path):
    (tmp_path / "report.html").write_text("of another")
    assert main(["report", rows, "-o", str(tmp_path / "report.v2.html"), "--format", "html,md"]) == 0
    assert (tmp_path / "report.html").read_text() == "of another"
    assert (tmp_path / "report.v2.html").exists()
    assert (tmp_path / "report.v2.md").exists()


def test_tasks_of_any_script_have_pictures_of_their_own(tmp_path):
    some = [
        row(method, 10, s, 0.2 - s / 10, data=f"数据/{name}.txt")
        for name in ("测试", "验证")
        for method, s in (("dense", 0), ("lte", 0.5))
    ]
    for one, count in zip(some, (1000, 1000, 900, 900), strict=True):
        one["evaluation"]["num_tokens"] = count
    rows = write(tmp_path / "rows.jsonl", some)
    assert main(["report", str(rows), "-o", str(tmp_path / "r.md"), "--format", "md,png"]) == 0
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (tmp_path / "r.md").read_text())
    assert len(pictures) == len(set(pictures)) > 3


def test_runs_that_diverged_are_failures(tmp_path):
    some = [row("dense", 10), row("lte", 10.4, 0.5, 0.12), row("lte", float("nan"), 0.5, 0.12, seed=2)]
    some += [row("cats", 1e304, 0.5, 0.15), row("dense", float("nan"), seed=2)]
    rows = write(tmp_path / "rows.jsonl", some)
    assert main(["report", str(rows), "-o", str(tmp_path / "r.md"), "--format", "md"]) == 0
    text = (tmp_path / "r.md").read_text()
    assert "perplexity is nan" in text
    assert "perplexity is 1e+304" in text
    assert "| LTE | 10.40 |" in text


def test_a_folder_of_a_sweep_and_of_a_run(rows, tmp_path):
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "a.md"), "--format", "md"]) == 0
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / "lte_training.json", [row("lte", 10.4, 0.5, 0.12)])
    assert main(["report", str(tmp_path / "one"), "-o", str(tmp_path / "b.md"), "--format", "md"]) == 0
    assert "No dense run is among these results" in (tmp_path / "b.md").read_text()


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_has_its_charts(metric, tmp_path):
    some = [row(method, 0.4, s, 0.2 - s / 10, metric=metric.name) for method, s in (("dense", 0), ("lte", 0.5))]
    path = write(tmp_path / "rows.jsonl", some)
    assert main(["report", str(path), "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count(f"{metric.title.split(',')[0]} against") >= 2


def test_a_classifier_has_one_section(tmp_path):
    some = [row(method, 0.8, s, 0.2 - s / 10, metric="accuracy") for method, s in (("dense", 0), ("lte", 0.5))]
    for one in some:
        one["evaluation"] |= {"f1": 0.7, "matthews": 0.6}
    given = ["report", str(write(tmp_path / "rows.jsonl", some)), "-o", str(tmp_path / "r.md"), "--format", "md"]
    for metric, first, others in (
        ([], "Accuracy", "| F1, % | Matthews correlation, % |"),
        (["--metric", "f1"], "F1", "| accuracy, % | Matthews correlation, % |"),
    ):
        assert main([*given, *metric]) == 0
        text = (tmp_path / "r.md").read_text()
        assert [line for line in text.splitlines() if " on wiki/test" in line and line[0] == "#"] == [
            f"## {first} on wiki/test, tiny"
        ]
        assert others in text
        assert "Matthews correlation as well." in text
        assert "70.00" in text


def test_only_failed_runs_and_only_dense_ones(tmp_path):
    failed = write(tmp_path / "failed.jsonl", [{"command": "lte train", "error": "no memory"}])
    assert main(["report", str(failed), "-o", str(tmp_path / "r.html")]) == 0
    assert "no memory" in (tmp_path / "r.html").read_text()
    dense = write(tmp_path / "dense.jsonl", [row("dense", 10)])
    assert main(["report", str(dense), "-o", str(tmp_path / "d.html"), "--format", "html,png,md"]) == 0


def test_a_run_and_its_further_evaluations_are_one_run(tmp_path):
    trained = row("lte", 12, 0.5)
    more = trained["evaluation"] | {"command": "lte eval out/lte-1 --text e2e/dev.txt"}
    swept = trained | {"command": f"{trained['command']} && {more['command']}", "evals": [more]}
    later = more | {"trained_by": trained["command"], "seed": 1, "method": "lte"}
    others = [more | {"command": f"lte eval m --max-rows {n}", "model": "m", "method": "teal"} for n in (1, 2)]
    rows = write(tmp_path / "rows.jsonl", [trained, swept, later, *others])
    assert main(["report", str(rows), "-o", str(tmp_path / "r.md"), "--format", "md"]) == 0
    assert "\n2 runs of models; from " in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_models_that_are_no_decoders(name, files, tmp_path):
    sparse, text = tmp_path / name, tmp_path / "text.txt"
    text.write_text("one two three")
    task = ["--task", "classification"] if name == "bert" else []
    assert main(["sparsify", "--model", str(files / name), "--expert-size", "8", "-o", str(sparse), *task]) == 0
    given = ["--model", str(sparse), "--text", str(text), "-o", str(tmp_path / "r.html"), "--max-tokens", "8"]
    assert main(["report", *given]) == 0
    page = (tmp_path / "r.html").read_text()
    assert f"8 tokens of the text, {4 if name == 't5' else 2} layers of 8 experts, mode soft" in page


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-o", "OUT/r.html"], "nothing to report"),
        (["OUT/nothing.jsonl", "-o", "OUT/r.html"], "no such file or folder"),
        (["OUT/empty", "-o", "OUT/r.html"], "has no rows.jsonl or lte_training.json"),
        (["OUT/other.jsonl", "-o", "OUT/r.html"], "none of the 1 rows is a result"),
        (["ROWS", "-o", "OUT/r.html", "--format", "pdf"], "format is 'pdf'"),
        (["ROWS", "-o", "OUT/r.md"], "ends in .html"),
        (["ROWS", "-o", "OUT"], "is a folder"),
        (["ROWS", "-o", "OUT/r.html", "--metric", "f1"], "metric is 'f1', but these results have: perplexity"),
        (["ROWS", "-o", "OUT/none/r.html"], "no folder"),
        (["ROWS", "-o", "OUT/r.html", "--model", "MODEL"], "--model and --text go together"),
        (["ROWS", "-o", "OUT/r.html", "--text", "ROWS"], "--model and --text go together"),
        (["ROWS", "-o", "OUT/r.html", "--before", "MODEL"], "--before is compared with --model"),
        (["ROWS", "-o", "OUT/r.html", "--model", "MODEL", "--text", "OUT/no.txt"], "no such file for --text"),
        (["ROWS", "-o", "OUT/r.html", "--model", "MODEL", "--text", "ROWS"], "has no routers"),
        (["ROWS", "-o", "OUT/r.html", "--model", "MODEL", "--text", "ROWS", "--max-tokens", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments, complaint, rows, files, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "other.jsonl", [{"name": "a note"}])
    replaced = {"ROWS": rows, "MODEL": str(files / "llama"), "OUT": str(tmp_path)}
    given = [re.sub("ROWS|MODEL|OUT", lambda found: replaced[found[0]], one) for one in arguments]
    assert main(["report", *given]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
    assert not (tmp_path / "r.html").exists()
