"""Tasks of lm_eval: its own answers, with sparsity counted in the same passes. The tasks are local files."""

import json
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lte
from byte_tokenizer import byte_tokenizer, with_bos
from lte.cli.main import main
from lte.evaluation.measuring import measure

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install "lte[eval]"')
from lm_eval.tasks import TaskManager

from lte.evaluation.harness import evaluate_tasks, find_tasks
from lte.evaluation.harness_model import not_padding

SHAPE = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": 0}
CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GENERATES = """
task: lte_say
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ROWS = [
    {"question": f"after {n} comes", "choices": [str(n + 1), f"certainly not {n}"], "gold": n % 2} for n in range(8, 14)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name in ("lte_count", "lte_count_again"):
        (folder / f"{name}.yaml").write_text(CHOICES.format(name=name, folder=folder))
    (folder / "lte_say.yaml").write_text(GENERATES.format(folder=folder))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # it asks `pip` for all packages


@pytest.fixture
def only_local(monkeypatch):
    """lm_eval's own tasks are 15,000 and take eight seconds to list."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


def model(kind):
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=256)).eval()
    if kind == "routers":
        lte.set_mode_(lte.sparsify_(made, lte.LTEConfig(expert_size=8)), "hard")
    if kind == "teal":
        rows = {"input_ids": torch.arange(2, 66)[None]}
        lte.teal_(made, lte.TEALConfig(0.6), data=[rows])
    return made


def rows_of_scores():
    """As lm_eval scores a multiple choice: question, a space, answer, without the last token; right answer first."""
    encode = byte_tokenizer()
    return [[encode(f"{row['question']} {choice}")["input_ids"] for choice in row["choices"]] for row in ROWS]


@torch.no_grad()
def best(made, row, several):
    scores = []
    start = len(row["question"])
    for ids in several:
        logits = made(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        scores.append(sum(logits[i - 1, ids[i]].item() for i in range(start, len(ids))))
    return scores.index(max(scores))


@pytest.mark.usefixtures("only_local")
@pytest.mark.parametrize("kind", ["dense", "routers", "teal"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_answers_sparsity_and_cost(folder, kind, batch_size):
    """The same answers and, padding left out, the same sparsity as row by row."""
    made = model(kind)
    found = evaluate_tasks(made, byte_tokenizer(), find_tasks(["lte_count"], folder), batch_size=batch_size)
    with measure(made) as meter:
        right = [best(made, row, some) == row["gold"] for row, some in zip(ROWS, rows_of_scores(), strict=True)]
    assert found.results["lte_count"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert found.results["lte_count"]["acc_stderr,none"] >= 0
    assert found.num_samples == {"lte_count": 6}
    assert found.shots == {"lte_count": 0}
    assert found.gflops_per_token_dense == lte.cost_per_token(made).gflops
    if kind == "dense":
        assert (found.sparsity, found.mode) == (0, "dense")
    elif kind == "routers":
        assert found.layer_sparsity == pytest.approx(meter.by_layer, abs=1e-4)
        assert 0 < found.sparsity < 1
    else:
        assert found.gflops_per_token == pytest.approx(lte.teal_cost(made, meter.by_linear).gflops, rel=1e-3)
        assert found.gflops_per_token < found.gflops_per_token_dense


def test_what_is_padding():
    batch = torch.tensor([[5, 6, 7], [0, 9, 0], [0, 0, 0]])
    assert not_padding(batch).tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]


@pytest.mark.usefixtures("only_local")
def test_generating_shots_and_limit(folder):
    tasks = find_tasks(["lte_say", "lte_count*"], folder, shots=1)
    assert set(tasks.names) == {"lte_say", "lte_count", "lte_count_again"}
    found = evaluate_tasks(model("routers"), byte_tokenizer(), tasks, limit=2, batch_size=2)
    assert found.results["lte_say"].keys() >= {"exact_match,none"}
    assert found.num_samples == dict.fromkeys(tasks.names, 2)
    assert found.shots["lte_count"] == 1
    assert 0 < found.sparsity < 1


@pytest.mark.slow
def test_command(folder, tmp_path, capsys):
    model("routers").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    given = ["eval", str(tmp_path), "--include-path", str(folder), "--device", "cpu"]
    assert main([*given, "--tasks", "lte_count, lte_say", "--limit", "3", "--num-fewshot", "0", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert found["results"]["lte_count"].keys() == {"acc,none", "acc_stderr,none"}
    assert "exact_match" in printed.out
    assert found["num_samples"] == {"lte_count": 3, "lte_say": 3}
    assert found["mode"] == "hard"
    assert "Traceback" not in printed.err


@pytest.mark.usefixtures("only_local")
def test_a_wrong_name(folder):
    with pytest.raises(ValueError, match=r"no task 'lte_cuont': did you mean lte_count or lte_count_again\?"):
        find_tasks(["lte_say", "lte_cuont"], folder)
    with pytest.raises(ValueError, match="no task 'zzz': `lm_eval ls tasks` lists them all"):
        find_tasks(["zzz"], folder)


@pytest.mark.slow
def test_its_own_tasks_are_known(tmp_path):
    """Their data is in a folder, because tests do not ask the hub."""
    with pytest.raises(ValueError, match="no task 'mmlu_anatomie': did you mean mmlu_anatomy"):
        find_tasks(["mmlu_anatomie"], data_folder=tmp_path)
    with pytest.raises(OSError, match=r"anatomy_test\.csv is missing"):
        find_tasks(["mmlu_anatomy"], data_folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "3"], "limit: this is for tasks of lm_eval: name some with --tasks"),
        (["--tasks", "x", "--text", "a.txt"], "bring their own data"),
        (["--tasks", "x", "--limit", "0"], "limit is 0: give at least 1"),
        (["--tasks", "x", "--num-fewshot", "-1"], "num_fewshot is -1: give at least 0"),
        (["--tasks", ","], "no task is named"),
        (["--tasks", "x", "--include-path", "/nowhere"], "/nowhere: there is no such folder"),
        (["--tasks", "x", "--data-folder", "/nowhere"], "/nowhere: there is no such folder"),
    ],
)
@pytest.mark.usefixtures("only_local")
def test_refused(options, message, tmp_path, capsys):
    model("dense").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert main(["eval", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("only_local")
@pytest.mark.parametrize("task", ["lte_count", "lte_say"])
def test_questions_begin_with_the_bos_of_the_tokenizer(folder, task):
    for tokenizer, bos in ((with_bos(), 1), (byte_tokenizer(), None)):
        made, read = model("dense"), []

        def look(_module, args, kwargs, read=read):
            read.append(args[0] if args else kwargs["input_ids"])

        made.register_forward_pre_hook(look, with_kwargs=True)
        evaluate_tasks(made, tokenizer, find_tasks([task], folder), batch_size=1)
        firsts = {ids[0, 0].item() for ids in read if ids.shape[1] > 1}
        assert firsts == {byte_tokenizer()("a")["input_ids"][0] if bos is None else bos}
