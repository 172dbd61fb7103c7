"""The commands in process, on tiny models: what they print, what they write, and how they refuse."""

import json
import math
import shlex
from pathlib import Path

import pytest
import yaml

from byte_tokenizer import byte_tokenizer
from lte.cli.main import COMMANDS, main
from lte.cli.train import parse_train
from lte.data.tasks import DataConfig, load_dataset_for
from lte.evaluation.evaluate import evaluate
from lte.evaluation.record import SUMMARY
from lte.surgery.loading import load_model

STEPS = ["--max-steps", "8", "--per-device-train-batch-size", "4", "--sequence-length", "32", "--report-to", "none"]
STEPS += ["--expert-size", "8", "--grouping", "random", "--device", "cpu", "--save-strategy", "no"]
REENTRANT = ["--gradient-checkpointing", "True", "--gradient-checkpointing-kwargs", '{"use_reentrant": true}']

BEST = ["--load-best-model-at-end", "--metric-for-best-model", "eval_loss", "--eval-strategy", "steps"]
BEST += ["--eval-steps", "2", "--save-strategy", "steps", "--save-steps", "2"]


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def sparse(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse") / "new" / "folder"
    assert main(["sparsify", "--model", str(files / "llama"), "-o", str(folder), "--expert-size", "8"]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """From a recipe, with overrides: the folder, and what was printed last."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = {"task": "language_modelling", "sequence_length": 32, "max_steps": 4, "learning_rate": 1e-3}
    recipe |= {"gradient_checkpointing": True, "save_strategy": "no", "report_to": "none", "logging_steps": 2}
    recipe |= {"per_device_train_batch_size": 4, "expert_size": 8, "lr_scheduler_kwargs": {}, "eta": None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    given = ["train", str(folder / "recipe.yaml"), "--model", str(files / "llama"), "--text", str(files / "text.txt")]
    given += ["-o", str(folder / "out"), "--target-sparsity", "0.5", "--max-steps", "12", "--weight-decay", "0.01"]
    assert main([*given, "--device", "cpu", "--json"]) == 0
    return folder / "out"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["--version"]])
def test_without_a_command(argv, capsys):
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert argv == ["--version"] or all(name in printed.out for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as stop:
        code = stop.code or 0
    assert code == 0
    printed = capsys.readouterr()
    assert "usage: lte" in printed.out
    assert printed.err == ""


def test_inspect(files, capsys):
    assert main(["inspect", str(files / "llama"), "--expert-size", "8", "--sparsity", "0.5", "0.8", "--json"]) == 0
    found = last_json(capsys)
    assert found["family"] == "llama"
    assert found["sparse"] is False
    assert found["lte"] is None
    assert (found["num_ffns"], found["expert_size"]) == (2, 8)
    assert (found["ffns"][0]["d_model"], found["ffns"][0]["d_ff"], found["ffns"][0]["experts"]) == (32, 64, 8)
    assert found["ffns"][0]["gated"] is True
    assert found["cost"].keys() == {"0.5", "0.8"}
    assert found["cost_dense"]["ffn_gflops"] == pytest.approx(2 * 2 * 3 * 32 * 64 / 2**30)
    assert found["cost"]["0.5"]["ffn_gflops"] == pytest.approx(found["cost_dense"]["ffn_gflops"] / 2)
    assert found["parameters"] > 0
    assert found["architecture"] == "LlamaForCausalLM"


def test_sparsify_keeps_the_function(files, sparse, capsys):
    assert main(["inspect", str(sparse), "--json"]) == 0
    found = last_json(capsys)
    assert found["sparse"] is True
    assert found["expert_size"] == 8
    evaluations = []
    for model in (files / "llama", sparse):
        given = ["eval", str(model), "--text", str(files / "text.txt"), "--sequence-length", "32", "--max-rows", "9"]
        assert main([*given, "--device", "cpu", "--json"]) == 0
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        evaluations.append(json.loads(printed.out.splitlines()[-1]))
    dense, converted = evaluations
    names = {"perplexity", "sparsity", "layer_sparsity", "gflops_per_token", "gflops_per_token_dense", "num_tokens"}
    assert names <= dense.keys() & converted.keys()
    assert converted["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)
    assert dense["num_tokens"] == converted["num_tokens"] == 9 * 31
    assert (dense["sparsity"], converted["sparsity"], converted["mode"]) == (0, 0, "dense")
    assert converted["layer_sparsity"] == [0, 0]


def test_eval_in_another_mode(files, sparse, capsys):
    given = ["eval", str(sparse), "--text", str(files / "text.txt"), "--sequence-length", "32", "--mode", "hard"]
    assert main([*given, "--device", "cpu", "--json"]) == 0
    found = last_json(capsys)
    assert found["mode"] == "hard"
    assert found["sparsity"] == pytest.approx(sum(found["layer_sparsity"]) / 2)
    assert 0.1 < found["sparsity"] < 0.9


def test_train_from_a_recipe(files, trained, capsys):
    summary = json.loads((trained / SUMMARY).read_text())
    assert summary["recipe"] == "default"
    assert summary["target_sparsity"] == 0.5
    assert summary["steps"] == {"dense": 3, "soft": 8, "hard": 1}
    assert summary["command"].startswith("lte train ")
    assert summary["environment"]["device"].startswith("cpu")
    assert summary["evaluation"]["mode"] == "hard"
    given = ["eval", str(trained), "--text", str(files / "text.txt"), "--sequence-length", "32", "--device", "cpu"]
    assert main([*given, "--json"]) == 0
    found = last_json(capsys)
    assert found["mode"] == "hard"
    assert found["sparsity"] == pytest.approx(0.5, abs=0.1)
    assert math.isfinite(found["perplexity"])


@pytest.mark.parametrize("name", ["--schedule", "--recipe"])
def test_a_typed_learning_rate_is_that_of_a_dense_run(name, tmp_path, caplog):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 6.0e-4\ndense_learning_rate: 3.0e-4\n")
    given = [str(recipe), "--model", "m", "--text", "t", "-o", str(tmp_path / "out")]

    def factor(*options):
        target = () if "dense" in options else ("--target-sparsity", "0.5")
        args = parse_train([*given, *options, *target]).training
        return args.learning_rate * args.dense_learning_rate_factor

    assert factor(name, "dense") == pytest.approx(3e-4)
    assert factor(name, "dense", "--learning-rate", "5e-5") == pytest.approx(5e-5)
    assert factor(name, "dense", "--learning-rate=5e-5") == pytest.approx(5e-5)
    assert not caplog.text
    assert factor("--learning-rate", "5e-5", "--dense-learning-rate", "2e-5") == pytest.approx(2e-5)
    assert not caplog.text
    assert factor("--learning-rate", "5e-5") == pytest.approx(3e-4)
    assert "the dense stage keeps the learning rate 0.0003" in caplog.text


@pytest.mark.slow
def test_generate(trained, capfd):
    given = ["generate", str(trained), "--prompt", "1 and 2", "--max-new-tokens", "5", "--device", "cpu"]
    assert main(given) == 0
    printed = capfd.readouterr()
    assert "mode hard" in printed.err
    assert "Traceback" not in printed.err
    assert main([*given, "--temperature", "0.8", "--top-p", "0.9", "--seed", "3"]) == 0


def test_the_output_is_quiet(files, tmp_path, capfd):
    given = ["train", "--model", str(files / "llama"), "--text", str(files / "ids.npy"), "-o", str(tmp_path / "out")]
    assert main([*given, *STEPS, "--target-sparsity", "0.5", "--logging-steps", "4", "--json"]) == 0
    printed = capfd.readouterr()
    for noise in ("Writing model", "tokens", "pin_memory", "Warning", "WARN", "it/s"):
        assert noise not in printed.err.replace("tokens cut", ""), noise
    assert "step 8/8" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["evaluation"]["num_tokens"] > 0


@pytest.mark.parametrize(
    ("model", "task", "text"),
    [
        ("bert", "classification", "classes.jsonl"),
        ("llama", "classification", "classes.jsonl"),
        ("llama", "generation", "prompts.jsonl"),
        ("t5", "generation", "prompts.jsonl"),
    ],
)
def test_train_the_other_tasks(files, tmp_path, capsys, model, task, text):
    given = ["train", "--model", str(files / model), "--text", str(files / text), "-o", str(tmp_path / "out")]
    assert main([*given, *STEPS, "--task", task, "--target-sparsity", "0.5", "--held-out", "0.2", "--json"]) == 0
    found = last_json(capsys)["evaluation"]
    assert (found["accuracy"] is None) == (task == "generation")
    given = ["eval", str(tmp_path / "out"), "--text", str(files / text), "--task", task, "--device", "cpu", "--json"]
    assert main([*given, "--sequence-length", "32"]) == 0
    found = last_json(capsys)
    assert found["mode"] == "hard"
    assert task == "generation" or 0 <= found["accuracy"] <= 1


def test_train_the_paper_schedule(files, tmp_path):
    given = ["train", "--model", str(files / "llama"), "--text", str(files / "text.txt"), "-o", str(tmp_path)]
    assert main([*given, *STEPS, "--schedule", "paper", "--eta", "0.5"]) == 0
    assert json.loads((tmp_path / SUMMARY).read_text())["eta"] == 0.5


def test_the_best_dense_model_by_other_data_than_the_last_evaluations(files, tmp_path):
    model, text = str(files / "llama"), str(files / "text.txt")
    chosen_by = tmp_path / "validation.txt"
    chosen_by.write_text("".join(f"{n} less {n} makes 0.\n" for n in range(40)))
    given = [
        "train",
        "--model",
        model,
        "--text",
        text,
        "-o",
        str(tmp_path / "out"),
        *STEPS,
        "--schedule",
        "dense",
        *BEST,
    ]
    given += ["--eval-text", text, "--calibration-text", str(chosen_by), "--calibration-rows", "2"]
    assert main([*given, "--learning-rate", "0.1", "--lr-scheduler-type", "constant"]) == 0
    losses = {}
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        losses[folder.name] = evaluation_loss(folder, chosen_by)
    state = json.loads((tmp_path / "out" / "checkpoint-8" / "trainer_state.json").read_text())
    found = {f"checkpoint-{logs['step']}": logs["eval_loss"] for logs in state["log_history"] if "eval_loss" in logs}
    assert found == pytest.approx(losses, rel=1e-3)
    assert evaluation_loss(tmp_path / "out", chosen_by) == pytest.approx(min(losses.values()), rel=1e-5)
    assert losses["checkpoint-8"] > 1.01 * min(losses.values())  # the last would not have done
    evaluated = json.loads((tmp_path / "out" / SUMMARY).read_text())["evaluation"]["loss"]
    assert evaluated == pytest.approx(evaluation_loss(tmp_path / "out", text), rel=1e-5)


def evaluation_loss(folder, text) -> float:
    model = load_model(str(folder))
    dataset = load_dataset_for("language_modelling", str(text), byte_tokenizer(), DataConfig(sequence_length=32))
    return evaluate(model, dataset).loss


def test_resume(files, tmp_path, monkeypatch, capfd):
    from lte.training.stages import _Stages

    def given(name, *more):
        options = ["train", "--model", str(files / "llama"), "--text", str(files / "text.txt")]
        options += ["-o", str(tmp_path / name), *STEPS, "--target-sparsity", "0.5", *more]
        return [*options, "--save-strategy", "steps", "--save-steps", "2"]

    assert main(given("whole", "--resume")) == 0  # nothing to resume yet
    assert "lte: warning: no whole checkpoint" in capfd.readouterr().err
    begin_step = _Stages.begin_step

    def stop_at_5(self, step):
        if step == 5:
            raise KeyboardInterrupt
        begin_step(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(_Stages, "begin_step", stop_at_5)
        assert main(given("cut")) == 130
    assert capfd.readouterr().err.splitlines()[-1] == (
        "lte: error: interrupted at step 5 of 8: --resume continues from step 4"
    )
    assert not (tmp_path / "cut" / SUMMARY).exists()
    assert main(given("cut", "--resume")) == 0
    whole, cut = (json.loads((tmp_path / name / SUMMARY).read_text()) for name in ("whole", "cut"))
    assert cut["eta"] == pytest.approx(whole["eta"], rel=1e-4)
    assert cut["evaluation"]["loss"] == pytest.approx(whole["evaluation"]["loss"], rel=1e-4)
    assert cut["evaluation"]["layer_sparsity"] == pytest.approx(whole["evaluation"]["layer_sparsity"], abs=1e-3)


def test_recipe_values(tmp_path):
    path = tmp_path / "r.yml"
    path.write_text(
        "model: m\noutput_dir: o\ntarget_sparsity: 0.5\nresume: true\nbf16: false\ntau: 0.4\n"
        "text: [a.txt, b.txt]\neval_text: [c.txt]\ngradient_checkpointing: true\nmax_grad_norm: 0.5\n"
        "class_names: [x, y]\nlearning_rate: 3.0e-4\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    found = parse_train([str(path), "--tau", "0.6", "--no-resume"])
    assert found.chosen_method.tau == 0.6
    assert found.resume is False
    assert found.data.text == ("a.txt", "b.txt")
    assert found.eval_text == ("c.txt",)
    assert found.data.data.class_names == ("x", "y")
    args = found.training
    assert (args.output_dir, args.bf16, args.gradient_checkpointing, args.max_grad_norm) == ("o", False, True, 0.5)
    assert args.learning_rate == 3e-4
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize("name", ["schedule", "recipe"])
def test_the_schedule_under_both_its_names(tmp_path, name):
    path, given = tmp_path / "r.yml", ["--model", "m", "-o", "o"]
    path.write_text(f"{name}: paper\neta: 0.5\n")
    for argv in ([str(path), *given], [f"--{name}", "paper", "--eta", "0.5", *given]):
        assert parse_train(argv).training.schedule == "paper"


@pytest.mark.parametrize(("file", "schedule"), [("paper", "paper"), ("wikitext2", "dense")])
def test_recorded_commands_still_parse(file, schedule):
    rows = (Path(__file__).parents[2] / "results" / f"{file}.jsonl").read_text().splitlines()
    commands = [json.loads(row).get("command", "") for row in rows]
    recorded = next(one for one in commands if one.startswith("lte train") and f"--recipe {schedule}" in one)
    assert parse_train(shlex.split(recorded.split(" && ")[0])[2:]).training.schedule == schedule


def refused(capfd, argv, said):
    code = main([str(one) for one in argv])
    printed = capfd.readouterr()
    assert code == 2, printed.err
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("lte: error: ")
    assert said.lower() in lines[0].lower()
    assert "Traceback" not in printed.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nonsense", "1"], "nonsense"),
        (["--target-sparsity", "1.5"], "target_sparsity is 1.5"),
        (["--target-sparsity", "much"], "much"),
        (["--target-sparsity", "0.5", "--eta", "1"], "eta is set"),
        (["--schedule", "paper"], "needs an eta"),
        (["--schedule", "none"], "default, dense, paper"),
        ([], "target_sparsity is None"),
        (["--target-sparsity", "0.5", "--expert-size", "7"], "7"),
        (["--target-sparsity", "0.5", "--text", "none.txt"], "none.txt"),
        (["--target-sparsity", "0.5", "--device", "gpu"], "gpu"),
        (["--target-sparsity", "0.5", "--max-steps", "1", "--hard-fraction", "1.0"], "soft stage no step"),
        (["--target-sparsity", "0.5", "--calibration-rows", "0"], "calibration_rows"),
        (["--target-sparsity", "0.5", "--held-out", "5000"], "hold out"),
        (["--target-sparsity", "0.5", "--model", "./none"], "no such folder"),
        (["--target-sparsity", "0.5", *REENTRANT], "non-reentrant"),
        (["--target-sparsity", "0.5", *BEST], "only schedule='dense'"),
        (["--schedule", "dense", *BEST], "give --calibration-text"),
    ],
)
def test_train_refuses(files, tmp_path, capfd, options, said):
    given = ["train", "--model", files / "llama", "--text", files / "text.txt", "-o", tmp_path / "out", *STEPS]
    refused(capfd, [*given, *options], said)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("a: [1", "not YAML"),
        ("- a\n- b", "must map"),
        ("", "must map"),
        ("target_sparsty: 0.5", "target-sparsty"),
        ("max_steps: many", "many"),
        (None, "r.yaml"),
    ],
)
def test_bad_recipes(files, tmp_path, capfd, recipe, said):
    path = tmp_path / "r.yaml"
    if recipe is not None:
        path.write_text(recipe)
    given = ["train", path, "--model", files / "llama", "--text", files / "text.txt", "-o", tmp_path / "out"]
    refused(capfd, [*given, "--target-sparsity", "0.5"], said)


def test_the_other_commands_refuse(files, sparse, tmp_path, capfd):
    model, text, out = files / "llama", files / "text.txt", tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    refused(capfd, ["nonsense"], "unknown command")
    refused(capfd, ["eval", "./none", "--text", text], "no such folder")
    refused(capfd, ["eval", tmp_path / "empty", "--text", text], "no config.json")
    refused(capfd, ["eval", text, "--text", text], "is a file")
    refused(capfd, ["eval", model], "no data")
    refused(capfd, ["eval", model, "--text", tmp_path / "none.txt"], "no such file")
    refused(capfd, ["eval", model, "--text", tmp_path / "empty.txt"], "empty")
    refused(capfd, ["eval", model, "--text", text, "--device", "nowhere"], "nowhere")
    refused(capfd, ["eval", model, "--text", text, "--device", "cuda:99"], "cuda:99")
    refused(capfd, ["eval", model, "--text", text, "--max-rows", "0"], "max_rows is 0")
    refused(capfd, ["eval", model, "--text", text, "--batch-size", "0", "--sequence-length", "32"], "batch_size")
    refused(capfd, ["eval", model, "--text", text, "--mode", "hard", "--sequence-length", "32"], "sparsify_")
    refused(capfd, ["eval", model, "--text", text, "--mode", "fast"], "fast")
    refused(capfd, ["sparsify", "--model", model, "-o", out, "--expert-size", "7"], "7")
    refused(capfd, ["sparsify", "--model", model, "-o", out, "--expert-size", "0"], "expert_size is 0")
    refused(capfd, ["sparsify", "--model", model, "-o", out, "--tau", "1"], "tau is 1")
    refused(capfd, ["sparsify", "--model", sparse, "-o", out], "sparse already")
    refused(capfd, ["sparsify", "--model", model], "output")
    refused(capfd, ["sparsify", "--model", model, "-o", out, "--grouping", "coactivation"], "no data")
    refused(capfd, ["inspect", model, "--expert-size", "7"], "7")
    refused(capfd, ["inspect", model, "--sparsity", "1.5"], "1.5")
    refused(capfd, ["generate", model, "--prompt", ""], "prompt is empty")
    refused(capfd, ["generate", model, "--prompt", "a", "--temperature", "-1"], "temperature is -1")
    refused(capfd, ["generate", model, "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0")
    refused(capfd, ["generate", model, "--prompt", "a", "--chat"], "no chat template")
    assert not out.exists()


def test_a_dense_baseline_is_a_plain_checkpoint_that_methods_convert(files, tmp_path):
    given = ["train", "--model", str(files / "llama"), "--text", str(files / "text.txt"), *STEPS, "--schedule", "dense"]
    assert main([*given, "-o", str(tmp_path / "dense")]) == 0
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert (config["architectures"], "lte" in config, "auto_map" in config) == (["LlamaForCausalLM"], False, False)
    given = ["sparsify", "--method", "cats", "--model", str(tmp_path / "dense"), "--text", str(files / "text.txt")]
    assert main([*given, "--device", "cpu", "-o", str(tmp_path / "cats")]) == 0


def test_the_best_dense_model_by_accuracy(files, tmp_path):
    rows = str(files / "classes.jsonl")
    best = [one.replace("eval_loss", "eval_accuracy") for one in BEST]
    given = ["train", "--model", str(files / "bert"), "--task", "classification", "--text", rows, "--eval-text", rows]
    given += ["--calibration-text", rows, *STEPS, "--schedule", "dense", *best, "-o", str(tmp_path)]
    assert main(given) == 0
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    found = [logs["eval_accuracy"] for logs in state["log_history"] if "eval_accuracy" in logs]
    assert len(found) == 4
    evaluated = json.loads((tmp_path / SUMMARY).read_text())["evaluation"]["accuracy"]
    assert evaluated == pytest.approx(max(found))


def test_thresholds_need_no_labels(files, tmp_path, capsys):
    rows, unlabelled = files / "classes.jsonl", tmp_path / "unlabelled.jsonl"
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    unlabelled.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = ["train", "--model", str(files / "bert"), "--task", "classification", "--text", str(rows), *STEPS]
    given += ["--calibration-text", str(unlabelled), "--target-sparsity", "0.5", "-o", str(tmp_path / "out")]
    assert main(given) == 0
    assert json.loads((tmp_path / "out" / SUMMARY).read_text())["evaluation"]["accuracy"] >= 0
    assert main([*given, "--eval-strategy", "steps"]) == 2
    assert "unlabelled.jsonl: no column 'label'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("off", [["--bf16", "False"], ["--no-bf16"]])
@pytest.mark.parametrize("on", [["--gradient-checkpointing", "True"], ["--gradient-checkpointing=True"]])
def test_switches_in_either_form(off, on):
    given = ["--model", "m", "--text", "t", "-o", "o", "--target-sparsity", "0.5"]
    args = parse_train([*given, *off, *on]).training
    assert (args.bf16, args.gradient_checkpointing) == (False, True)
    assert not parse_train([*given, *off, "--no-gradient-checkpointing"]).training.gradient_checkpointing
