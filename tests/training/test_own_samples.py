"""Data that a model writes: chats that can be trained on, the same after an interruption."""

import json
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from byte_tokenizer import byte_tokenizer
from lte.cli.main import main
from lte.data.config import DataConfig
from lte.data.prompts import load_prompts
from lte.training import own_samples
from lte.training.own_samples import SampleOptions, Writer, repeats

TEMPLATE = (
    "{% for one in messages %}<|{{ one['role'] }}|>{{ one['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FEW = ["--num-samples", "12", "--batch-size", "6", "--max-prompt-tokens", "40", "--max-new-tokens", "60"]
FEW += ["--device", "cpu", "--seed", "5"]


def tokenizer(chat):
    made = byte_tokenizer()
    if chat:
        made.chat_template = TEMPLATE
        made.add_special_tokens({"additional_special_tokens": ["<end>"]})
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written_model(tmp_path_factory.mktemp("model"), chat=True)


def written_model(folder, chat):
    """Many tokens end a text, because a random model writes each of them rarely."""
    torch.manual_seed(0)
    shape = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    made = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, max_position_embeddings=256))
    made.generation_config.eos_token_id = [0, *range(10, 30), 258]
    made.save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder


def run(folder, output, *more):
    return main(["sample", "--model", str(folder), "-o", str(output), *FEW, *more])


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_chats_that_can_be_trained_on(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "own.jsonl", "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = rows_in(tmp_path / "own.jsonl")
    assert len(rows) == found["rows"] == 12
    assert found["tokens"] > 12 * 5
    assert not (tmp_path / "own.jsonl.batches").exists()
    prompts, answers = load_prompts([tmp_path / "own.jsonl"], DataConfig(messages="messages"), tokenizer(True))
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        asked, answered = row["messages"]
        assert (asked["role"], answered["role"]) == ("user", "assistant")
        assert prompt == f"<|user|>{asked['content']}<end><|assistant|>"
        assert answer == f"{answered['content']}<end>"
        assert asked["content"].strip()
    asked = [" ".join(row["messages"][0]["content"].lower().split()) for row in rows]
    assert len(set(asked)) == 12


def test_a_killed_run_repeats_nothing_and_loses_nothing(folder, tmp_path, monkeypatch):
    more = ("--num-samples", "18")
    assert run(folder, tmp_path / "whole.jsonl", *more) == 0
    write, numbers = Writer.write, []

    def counted(self, number):
        if len(numbers) == 1:
            numbers.append("killed")
            raise KeyboardInterrupt
        numbers.append(number)
        return write(self, number)

    monkeypatch.setattr(Writer, "write", counted)
    output = tmp_path / "cut.jsonl"
    assert run(folder, output, *more) == 130
    assert not output.exists()
    working = tmp_path / "cut.jsonl.batches"
    with working.open("ab") as file:
        file.write('{"rows": [{"messages": "ü'.encode()[:-1])  # killed while it wrote
    assert run(folder, output, *more) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(numbers) > 2
    assert numbers == [0, "killed", *range(1, len(numbers) - 1)]


def test_a_run_with_other_options_is_another_run(folder, tmp_path, monkeypatch, capsys):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "write", killed)
        assert run(folder, tmp_path / "own.jsonl") == 130
    capsys.readouterr()
    assert run(folder, tmp_path / "own.jsonl", "--temperature", "0.5") == 2
    assert "own.jsonl.batches was begun in another way" in capsys.readouterr().err


def test_shards_are_parts_of_the_whole(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    writer = Writer(model, tokenizer(True), SampleOptions(max_prompt_tokens=40, max_new_tokens=60, batch_size=4))
    first, second = writer.write(0), writer.write(1)
    assert writer.write(1) == second
    assert first.rows != second.rows
    assert first.tokens > 0
    dropped = sum(first.dropped.values())
    assert len(first.rows) + dropped == 4


def test_answers_to_given_prompts(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("What?\nWho?\nWhat?\n\nWhere?\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "100"]
    assert main(["sample", "--model", str(folder), "-o", str(tmp_path / "own.jsonl"), *options, "--device", "cpu"]) == 0
    asked = [row["messages"][0]["content"] for row in rows_in(tmp_path / "own.jsonl")]
    assert asked == [one for one in ("What?", "Who?", "Where?") if one in asked]
    assert asked


def test_texts_of_a_model_without_a_template(tmp_path):
    folder = written_model(tmp_path / "base", chat=False)
    assert run(folder, tmp_path / "own.jsonl") == 0
    rows = rows_in(tmp_path / "own.jsonl")
    assert len(rows) == 12
    assert all(row.keys() == {"text"} and row["text"].strip() for row in rows)


def test_what_repeats():
    """Of 8 tokens in a row: a loop, a list with a common frame, a text, a short answer."""
    assert repeats([1, 2, 3] * 20)
    assert not repeats(list(range(60)))
    assert not repeats([7, 7, 7, 7, 7])
    twice = [*range(30), *range(30)]  # 53 runs, 23 of them for the second time
    assert repeats(twice)
    assert not repeats([*range(100), *range(15)])  # 8 of 108


def test_no_endless_search(folder, tmp_path, monkeypatch, capsys):
    batch = own_samples.Batch([], Counter({"answer too long": 6}), 10)
    monkeypatch.setattr(Writer, "write", lambda *_: batch)
    assert run(folder, tmp_path / "own.jsonl") == 2
    assert "10 batches gave no usable text (60 answer too long)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "2/2"], "shard is '2/2': write I/N"),
        (["--num-samples", "0"], "num_samples is 0: give at least 1"),
        (["--temperature", "0"], "give above 0"),
        (["--max-new-tokens", "300"], "beyond the model's 256 positions"),
        (["-o", "own.txt"], "has to end in .jsonl"),
        (["-o", "here.jsonl"], "is there already"),
    ],
)
def test_refused(folder, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").write_text("")
    assert main(["sample", "--model", str(folder), "-o", "own.jsonl", "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
