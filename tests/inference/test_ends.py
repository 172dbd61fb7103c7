"""Stop strings in the decoding loop: the tokens of Hugging Face's loop, row by row."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteriaList

import lte
from byte_tokenizer import byte_tokenizer
from lte.inference import generate as generate_file
from lte.inference.completions import padded
from lte.inference.ends import Until

TOKENIZER = byte_tokenizer()
OPTIONS = {"do_sample": True, "max_new_tokens": 40, "pad_token_id": 1, "eos_token_id": [0]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).eval()


@pytest.fixture
def texts(model, monkeypatch):
    """Sampled once, so that strings are known to occur; then greedy choice of the same tokens, by their place."""
    inputs = padded([torch.tensor(TOKENIZER(one)["input_ids"]) for one in ("ab", "abcdef", "c")], "left", 1)
    made = lte.generate(model, inputs, seed=3, **OPTIONS)[:, inputs["input_ids"].shape[1] :]
    return inputs, made


def criteria(strings, inputs):
    return StoppingCriteriaList([Until(strings, TOKENIZER, inputs["input_ids"].shape[1])])


def strings_in(made):
    """Some that end the rows at different places, and one of two tokens."""
    decoded = [TOKENIZER.decode(row[:30].tolist()) for row in made]
    return [decoded[0][7:9], decoded[1][14:16], decoded[2][20:22], "<no such string>"]


@pytest.mark.parametrize("way", ["until", "stop_strings"])
def test_the_tokens_are_those_of_hugging_faces_loop(model, texts, way, monkeypatch):
    inputs, made = texts
    strings = strings_in(made)
    asked = {"stopping_criteria": criteria(strings, inputs)}
    if way == "stop_strings":
        asked = {"stop_strings": strings, "tokenizer": TOKENIZER}
    torch.manual_seed(3)
    expected = model.generate(**inputs, **OPTIONS, **asked)
    refused = []
    monkeypatch.setattr(generate_file, "_say_not_covered", lambda _, reason: refused.append(str(reason)))
    found = lte.generate(model, inputs, seed=3, **OPTIONS, **asked)
    assert not refused
    assert torch.equal(found, expected)
    assert found.shape[1] < inputs["input_ids"].shape[1] + made.shape[1]


def test_a_streamer_sees_the_end(model, texts):
    inputs, _ = texts
    row = {name: value[1:2] for name, value in inputs.items()}
    first = lte.generate(model, row, seed=3, **OPTIONS)[0, 6:]
    string = TOKENIZER.decode(first[5:7].tolist())
    seen = []

    class Streamer:
        def put(self, value):
            seen.append(value)

        def end(self):
            seen.append("end")

    out = lte.generate(model, row, seed=3, stopping_criteria=criteria([string], row), streamer=Streamer(), **OPTIONS)
    assert seen.pop() == "end"
    assert torch.equal(torch.cat([seen[0].flatten(), *seen[1:]]), out[0])
    assert string in TOKENIZER.decode(out[0, 6:].tolist())
    assert string not in TOKENIZER.decode(out[0, 6:-1].tolist())


def test_a_string_does_not_begin_in_the_prompt():
    ids = torch.tensor([TOKENIZER("one st")["input_ids"], TOKENIZER("two op")["input_ids"]])
    more = torch.tensor([TOKENIZER("op")["input_ids"], TOKENIZER("st")["input_ids"]])
    until = Until(["stop", "st"], TOKENIZER, 6)
    assert until(torch.cat([ids, more], dim=1), None).tolist() == [False, True]


def test_cut():
    until = Until(["stop", "\n\n"], TOKENIZER, 0)
    ids = torch.tensor(TOKENIZER("go on\nstop here")["input_ids"])
    assert TOKENIZER.decode(until.cut(ids)) == "go on\nstop"
    assert torch.equal(until.cut(ids[:8]), ids[:8])
    assert len(until.cut(ids[:0])) == 0
