"""lm_eval's own GSM8K, MMLU and HumanEval on released files: answers as its own model gives, one by one."""

import csv
import gzip
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lte
from byte_tokenizer import byte_tokenizer
from lte.cli.main import main
from lte.inference.completions import complete

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install "lte[eval]"')
import lm_eval.tasks
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lte.evaluation.harness import evaluate_tasks, find_tasks

DEFINITIONS = Path(lm_eval.tasks.__file__).parent
SHAPE = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": 0}


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 6), ("test", 5)):
        sums = [{"question": f"{n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(count)]
        write_lines(folder / "gsm8k" / f"{split}.jsonl", sums)
    problem = {"prompt": "def one():\n", "entry_point": "one", "canonical_solution": "    return 1\n"}
    problem["test"] = "def check(candidate):\n    assert candidate() == 1\n"
    write_lines(folder / "humaneval" / "HumanEval.jsonl.gz", [problem | {"task_id": f"{n}"} for n in range(3)])
    for split in ("dev", "test"):
        (folder / "mmlu" / split).mkdir(parents=True)
        with (folder / "mmlu" / split / f"anatomy_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [f"{'Very ' * n}007, is it?", "001", 'a "bone", yes', "NA", "none\nof these", "ABCD"[n % 4]]
                for n in range(6)
            )
    return folder


@pytest.fixture(autouse=True)
def only_these(monkeypatch, tmp_path):
    """lm_eval's own tasks are 15,000 and take eight seconds to list, and it asks `pip` for all packages."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def model(kind="dense"):
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=2048)).eval()
    made.generation_config.eos_token_id = [0, *range(10, 40)]  # so that most texts are short
    if kind == "routers":
        lte.set_mode_(lte.sparsify_(made, lte.LTEConfig(expert_size=8)), "hard")
    return made


TASKS = [("gsm8k", "gsm8k"), ("mmlu_anatomy", "mmlu/default"), ("humaneval", "humaneval")]


def loaded(task, folder, data):
    return find_tasks([task], DEFINITIONS / folder, data, allow_code_execution=True)


@pytest.mark.parametrize(("task", "folder"), TASKS)
@pytest.mark.parametrize("kind", ["routers", pytest.param("dense", marks=pytest.mark.slow)])
def test_each_answer_is_that_of_lm_evals_own_model(task, folder, data, kind):
    """The reference generates by Hugging Face's loop, one question at a time, without our loop and its packing."""
    made = model(kind)
    tasks = loaded(task, folder, data)
    reference = simple_evaluate(
        HFLM(pretrained=made, tokenizer=byte_tokenizer(), batch_size=1, add_bos_token=False),
        tasks=tasks.found,
        task_manager=tasks.manager,
        confirm_run_unsafe_code=True,
    )
    if kind == "routers":
        lte.optimize_(made)
    found = evaluate_tasks(made, byte_tokenizer(), loaded(task, folder, data), batch_size=2)
    expected = reference["samples"][task]
    assert len(found.predictions) == len(expected) >= 3
    for mine, its in zip(found.predictions, expected, strict=True):
        its = {name: its.get(name) for name in mine} | {"task": task}
        if task == "mmlu_anatomy":  # log-likelihoods
            for name in ("resps", "filtered_resps"):
                torch.testing.assert_close(torch.tensor(mine.pop(name)), torch.tensor(its.pop(name)))
        assert mine == its
    assert found.results[task] == {
        name: value for name, value in reference["results"][task].items() if isinstance(value, float)
    }


def test_choices_of_mmlu_are_as_in_the_file(data):
    (task,) = loaded("mmlu_anatomy", "mmlu/default", data).found
    assert task.dataset["test"][1] == {
        "question": "Very 007, is it?",
        "choices": ["001", 'a "bone", yes', "NA", "none\nof these"],
        "answer": 1,
    }


@torch.no_grad()
def test_generated_tokens_are_measured_alone(data, monkeypatch):
    """Against passes over single rows, of whose scores only those of generated tokens are taken."""
    made, kept = model("routers"), []
    monkeypatch.setattr(
        "lte.evaluation.harness_model.complete",
        lambda *args, **options: [kept.append(one) or one for one in complete(*args, **options)],
    )
    found = evaluate_tasks(made, byte_tokenizer(), loaded("gsm8k", "gsm8k", data), batch_size=4)
    idle: dict[str, list] = {"all": [], "new": []}
    with lte.record_scores(made) as recording:
        for one in kept:
            made(torch.cat([one.prompt, one.new])[None])
            idle_LTE = torch.stack([scores[0] <= 0.5 for scores in recording.scores.values()]).float()
            idle["all"].append(idle_LTE.mean((0, 2)))
            idle["new"].append(idle_LTE.mean((0, 2))[len(one.prompt) :])
    assert found.generated is not None
    assert found.generated["num_tokens"] == sum(len(one.new) for one in kept) == len(torch.cat(idle["new"]))
    assert found.sparsity == pytest.approx(torch.cat(idle["all"]).mean().item(), abs=1e-4)
    assert found.generated["sparsity"] == pytest.approx(torch.cat(idle["new"]).mean().item(), abs=1e-4)
    assert found.generated["sparsity"] != pytest.approx(found.sparsity, abs=1e-4)
    cost = lte.cost_per_token(made, found.generated["layer_sparsity"], 8).gflops
    assert found.generated["gflops_per_token"] == pytest.approx(cost)


def test_texts_without_room(data):
    made = model()
    made.config.max_position_embeddings = 1024
    with pytest.raises(ValueError, match="writes up to 1024 tokens, but the model has 1024 positions"):
        evaluate_tasks(made, byte_tokenizer(), loaded("humaneval", "humaneval", data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "anatomy_dev.csv is missing"),
        (lambda path: path.write_text("a,b,c,d,e,A\na,b,c,A\n"), "row 2: a row is a question, four choices"),
        (lambda path: path.write_text("a,b,c,d,e,E\n"), "row 1: a row is a question, four choices"),
        (lambda path: path.write_text('a,b,c,d,"e\n'), "it has to be CSV"),
    ],
)
def test_files_that_are_not_as_released(tmp_path, data, change, message):
    for split in ("dev", "test"):
        copy = tmp_path / "mmlu" / split / f"anatomy_{split}.csv"
        copy.parent.mkdir(parents=True)
        copy.write_bytes((data / "mmlu" / split / copy.name).read_bytes())
    change(tmp_path / "mmlu" / "dev" / "anatomy_dev.csv")
    with pytest.raises((ValueError, OSError), match=message):
        loaded("mmlu_anatomy", "mmlu/default", tmp_path)


def test_a_copy_of_a_hub_data_set(tmp_path, data):
    (tmp_path / "tasks").mkdir()
    task = "task: own\ndataset_path: someone/rows\ntest_split: test\noutput_type: generate_until\n"
    task += "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\ngeneration_kwargs: {until: ['.']}\n"
    (tmp_path / "tasks" / "own.yaml").write_text(task)
    copy = tmp_path / "someone" / "rows"
    copy.mkdir(parents=True)
    (copy / "test.jsonl").write_bytes((data / "gsm8k" / "test.jsonl").read_bytes())
    (found,) = find_tasks(["own"], tmp_path / "tasks", tmp_path).found
    assert found.dataset["test"]["question"][:2] == ["0 and 0?", "1 and 1?"]


def test_programs_do_not_run_unasked(tmp_path, data, capsys):
    model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    given = ["eval", str(tmp_path), "--tasks", "humaneval", "--data-folder", str(data)]
    given += ["--include-path", str(DEFINITIONS / "humaneval"), "--device", "cpu"]
    assert main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == ("lte: error: a task runs programs that the model writes: allow it with --allow-code-execution")


@pytest.mark.slow
def test_the_report_has_the_share_of_the_original(tmp_path, data, capsys):
    original, sparse = tmp_path / "original", tmp_path / "sparse"
    model().save_pretrained(original)
    byte_tokenizer().save_pretrained(original)
    assert main(["sparsify", "--model", str(original), "-o", str(sparse), "--expert-size", "8"]) == 0
    lines = []
    for folder in (original, sparse):
        given = ["eval", str(folder), "--tasks", "mmlu_anatomy", "--data-folder", str(data), "--device", "cpu"]
        given += ["--include-path", str(DEFINITIONS / "mmlu" / "default"), "--num-fewshot", "2", "--json"]
        assert main([*given, "--predictions", str(tmp_path / "answers.jsonl")]) == 0
        lines.append(capsys.readouterr().out.splitlines()[-1])
        answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        accuracy = sum(one["acc"] for one in answers) / len(answers)
        assert json.loads(lines[-1])["results"]["mmlu_anatomy"]["acc,none"] == pytest.approx(accuracy)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert main(["report", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "r.md"), "--format", "md"]) == 0
    score = f"{100 * accuracy:.2f}"  # in mode dense the sparse model computes the same
    page = (tmp_path / "r.md").read_text()
    (own,) = [line for line in page.splitlines() if line.startswith("| original, the original |")]
    assert own.endswith(f"| {score} |")
    assert f"| {score} (100.0%) |" in page
