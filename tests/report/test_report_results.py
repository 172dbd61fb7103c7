"""What the report reads from rows, against rows made by hand."""

import json

import pytest

from lte.report.older_rows import parse_command, split_commands
from lte.report.results import read_results
from result_rows import bench, row, write


def named(qualities):
    return {metric.name: value for metric, value in qualities.items()}


def test_a_row_becomes_a_measurement(tmp_path):
    (one,) = read_results([write(tmp_path / "rows.jsonl", [row("cats", 12.5, 0.5, 0.15, seed=3)])]).measurements
    assert (one.task, one.count, one.unit) == ("wiki/test", 1000, "labels")
    assert (one.method, one.model, one.seed, one.steps) == ("CATS", "tiny", (3,), 300)
    assert (named(one.qualities), one.sparsity, one.gflops, one.gflops_dense) == ({"perplexity": 12.5}, 0.5, 0.15, 0.2)
    assert one.layer_sparsity == (0.4, 0.5, 0.6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recipe": "dense"}, "dense"),
        ({"recipe": "default"}, "LTE"),
        ({"recipe": "paper"}, "LTE, paper's schedule"),
        ({"method": "deja-vu"}, "Deja Vu"),
        ({"method": {"method": "teal", "seed": 0}}, "TEAL"),
        ({"method": {"method": "moefication", "selection": "mlp"}}, "MoEfication"),
        (
            {"method": {"method": "moefication", "selection": "oracle", "activation": "relu"}},
            "MoEfication, oracle, relu",
        ),
        ({"method": {"method": "deja-vu", "selection": "top_k", "activation": None}}, "Deja Vu, top-k"),
        ({"method": "something-new"}, "something-new"),
    ],
)
def test_the_method(tmp_path, changes, expected):
    (one,) = read_results([write(tmp_path / "rows.jsonl", [row(None, 12.0, 0.5) | changes])]).measurements
    assert one.method == expected


def test_every_metric_and_every_further_evaluation(tmp_path):
    trained = row("lte", 12.0, 0.5)
    generated = {**trained["evaluation"], "rougeL": 60.0, "bleu": 40.0, "num_prompts": 630, "perplexity": None}
    trained["evals"] = [{**generated, "command": "lte eval out/lte-1 --text e2e/dev.csv --generate"}]
    found = read_results([write(tmp_path / "rows.jsonl", [trained])]).measurements
    assert [(named(one.qualities), one.task, one.count, one.unit) for one in found] == [
        ({"perplexity": 12.0}, "wiki/test", 1000, "labels"),
        ({"rougeL": 60.0, "bleu": 40.0}, "e2e/dev", 630, "prompts"),
    ]
    assert {one.model for one in found} == {"tiny"}


def test_tasks_of_lm_eval(tmp_path):
    one = {"results": {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "lambada": {"perplexity,none": 9.0}}}
    one |= {"num_samples": {"arc_easy": 40, "lambada": 8}, "mode": "hard", "sparsity": 0.5, "gflops_per_token": 0.1}
    (found,) = read_results([write(tmp_path / "rows.jsonl", [{**one, "method": "cats"}])]).measurements
    assert (named(found.qualities), found.task, found.count) == ({"accuracy": 50}, "arc_easy", 40)


def test_of_tasks_with_subjects_the_group_that_was_asked_for_counts(tmp_path):
    results = {name: {"acc,none": 0.5} for name in ("mmlu", "mmlu_stem", "mmlu_anatomy")}
    results["gsm8k"] = {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5}
    one = {"results": results, "num_samples": dict.fromkeys(results, 40), "sparsity": 0.5, "gflops_per_token": 0.1}
    one |= {"measured": {"kind": "lm_eval", "data": ["mmlu", "gsm8k"]}, "method": "cats"}
    found = read_results([write(tmp_path / "rows.jsonl", [one])]).measurements
    assert [(each.task, named(each.qualities)) for each in found] == [
        ("mmlu", {"accuracy": 50}),
        ("gsm8k", {"exact_match": 50, "strict_match": 25}),
    ]


def evaluated(model: str, method: dict, **more) -> dict:
    """A line of lte eval --json."""
    found = {"command": f"lte eval --text wiki/test.txt --json {model}", "model": model.split()[0], "method": method}
    found |= {"sparsity": 0.5, "gflops_per_token": 0.15, "gflops_per_token_dense": 0.2, "num_tokens": 1000}
    return found | {"perplexity": 12.0, "mode": "hard"} | more


def measured(tmp_path, *rows):
    return read_results([write(tmp_path / "rows.jsonl", list(rows))]).measurements


def test_models_evaluated_alike_are_not_one(tmp_path):
    found = measured(tmp_path, *(evaluated(f"out/teal-{one}", {"method": "teal"}) for one in (1, 2, 3)))
    assert len({one.setting for one in found}) == 3
    assert [one.model for one in found] == ["", "", ""]
    (dense,) = measured(tmp_path, evaluated("models/tiny", {"method": "dense"}))
    assert (dense.method, dense.model) == ("dense", "tiny")


def test_an_evaluation_knows_how_its_model_was_trained(tmp_path):
    trained = row("cats", 12.0, 0.5, seed=3)
    more = {"trained_by": trained["command"], "seed": 3, "recipe": "default", "steps": trained["steps"]}
    one, other, soft = measured(
        tmp_path,
        evaluated("out/cats-3", {"method": "cats"}, **more),
        evaluated("out/cats-4", {"method": "cats"}, **more | {"trained_by": trained["command"].replace("-3", "-4")}),
        evaluated("out/cats-4 --mode soft", {"method": "cats"}, **more),
    )
    assert (one.task, one.model, one.seed, one.steps) == ("wiki/test", "tiny", (3,), 300)
    assert one.setting == other.setting != soft.setting


def test_further_evaluations_in_another_mode_are_not_the_same_run_again(tmp_path):
    trained = row("lte", 12.0, 0.5)
    trained["evals"] = [evaluated(f"out/lte-1 --mode {mode}", {"method": "lte"}) for mode in ("soft", "hard")]
    assert len({one.setting for one in measured(tmp_path, trained)}) == 3


def made_at_once(command: str, method: dict, **more) -> dict:
    """A row of lte sweep where the command does not evaluate."""
    evals = [evaluated(f"out/m --text {name}.txt", method) for name in ("wiki/test", "wiki/other")]
    command = " && ".join([command, *(one["command"] for one in evals)])
    return {"command": command, "method": method, "evaluation": evals[0], "evals": evals[1:]} | more


def test_what_a_sweep_made_at_once_is_told_apart_by_how_it_was_made(tmp_path):
    cats = "lte sparsify --method cats --model models/tiny --target-sparsity {} --seed {} --output out/m"
    rows = [made_at_once(cats.format(*of), {"method": "cats"}, seed=of[1]) for of in ((0.3, 1), (0.3, 2), (0.5, 1))]
    found = measured(tmp_path, *(row | {"model": "models/tiny"} for row in rows))
    assert [(one.method, one.model, one.seed) for one in found[::2]] == [
        ("CATS", "tiny", (seed,)) for seed in (1, 2, 1)
    ]
    assert [one.task for one in found[:2]] == ["wiki/test", "wiki/other"]
    first, again, other = (one.setting for one in found[::2])
    assert first == again != other
    assert [option for command in first for option in command].count("--model models/tiny") == 1


def test_what_a_sweep_calibrated_is_told_apart_by_the_model_it_began_with(tmp_path):
    row = made_at_once("lte calibrate out/a --target-sparsity 0.3 --output out/m", {"method": "lte"})
    more = {"seed": 0, "recipe": "paper", "steps": {"dense": 0, "soft": 300, "hard": 0}}
    one, *_, other = measured(tmp_path, row | more | {"model": "out/a"}, row | more | {"model": "out/b"})
    assert (one.method, one.steps) == ("LTE, paper's schedule", 300)
    assert one.setting != other.setting


@pytest.mark.parametrize(
    ("method", "title"),
    [
        ({"method": "wanda", "pattern": "2:4"}, "Wanda, 2:4"),
        ({"method": "magnitude", "pattern": None}, "magnitude pruning"),
        ({"method": "pruned-weights"}, "pruned weights"),
    ],
)
def test_pruned_weights_are_where_their_zeros_put_them(tmp_path, method, title):
    zeros = {"sparsity": 0.0, "weight_sparsity": 0.5, "gflops_per_token": 0.1, "mode": "dense"}
    (one,) = measured(tmp_path, evaluated("out/wanda", method, **zeros))
    assert (one.method, one.sparsity, one.gflops, one.beyond_ffn) == (title, 0.5, 0.1, "weights")


def test_accuracy_is_shown_in_percent(tmp_path):
    (one,) = read_results([write(tmp_path / "r.jsonl", [row("lte", 0.875, 0.5, metric="accuracy")])]).measurements
    assert named(one.qualities) == {"accuracy": 87.5}


def test_one_run_as_json_and_rows_of_other_kinds(tmp_path):
    single = tmp_path / "lte_training.json"
    single.write_text(json.dumps(row("lte", 12.0, 0.5), indent=2))
    found = read_results([single, write(tmp_path / "other.jsonl", [{"name": "a note"}])])
    assert len(found.measurements) == 1
    assert found.others == 1


def test_failed_runs_are_listed_unless_they_went_well_later(tmp_path):
    good = row("lte", 12.0, 0.5)
    again = {"run": {"seed": "1"}, "command": good["command"], "error": "stopped"}
    failed = {"run": {"method": "cats", "seed": "2"}, "command": "lte train --method cats", "error": "out of memory"}
    found = read_results([write(tmp_path / "rows.jsonl", [again, failed, good, bench()])])
    assert found.failures == [
        ("lte bench ffn --shape tiny", "out of memory"),
        ("method cats, seed 2", "out of memory"),
    ]
    assert len(found.measurements) == 1
    assert len(found.benches) == 1


@pytest.mark.parametrize(
    ("text", "complaint"), [("{}\nnonsense\n", "line 2 is not JSON"), ("[1]\n", "no JSON object"), ("", "is empty")]
)
def test_files_of_another_kind(tmp_path, text, complaint):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_results([path])


def test_options_of_a_command():
    found = parse_command("lte train r.yaml --text a.txt b.txt --lr=1e-4 --bias -1 --resume && lte eval o --max-rows 3")
    assert found == {"": "lte train r.yaml", "--text": "a.txt b.txt", "--lr": "1e-4", "--bias": "-1", "--resume": ""}
    assert parse_command('an open "quote') == {}
    behind = parse_command("lte eval --batch-size 4 out/1 --text t --json", "out/1")
    assert behind == {"": "lte eval out/1", "--batch-size": "4", "--text": "t", "--json": ""}


def test_commands_are_split_where_a_shell_splits_them():
    eval_ = """lte eval o --prompt '{a} && "'"'"'{b}' --completion "it's && \\" && c" --json"""
    assert split_commands(f"lte prune -o o && {eval_} && lte eval p") == ["lte prune -o o", eval_, "lte eval p"]
    assert parse_command(f"lte prune -o o && {eval_}")["--completion"] == "it's && \" && c"


def test_where_predictions_went_tells_no_runs_apart(tmp_path):
    found = measured(tmp_path, *(evaluated(f"m --predictions {n}.jsonl", {"method": "dense"}, seed=n) for n in (1, 2)))
    assert len({one.setting for one in found}) == 1


@pytest.mark.parametrize(
    ("command", "task", "setting"),
    [
        ("lte train r.yaml --seed 3 -o out/3", "", "r.yaml"),
        ("lte train --text a/b.txt.gz --lr 1", "a/b, held out", "--text a/b.txt.gz --lr 1"),
        ("lte eval out/3 --text x/y/wiki2/test.npy", "wiki2/test", "--text x/y/wiki2/test.npy"),
        ("lte eval out/3 --text d/wiki.valid.txt.gz", "d/wiki.valid", "--text d/wiki.valid.txt.gz"),
        ("lte eval out/3 --mmlu folder", "MMLU", "--mmlu folder"),
        ("lte sparsify --model m --text c -o d && lte eval d --text w/t.txt", "w/t", "--model m --text w/t.txt"),
    ],
)
def test_what_a_command_of_an_older_row_says(tmp_path, command, task, setting):
    one = row("lte", 12.0, 0.5) | {"command": command}
    (found,) = measured(tmp_path, one)
    assert (found.task, " ".join(option for of in found.setting for option in of)) == (task, setting)
