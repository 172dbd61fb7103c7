"""Chat templates: which tokens are prompt, which are answer, turn by turn."""

import json

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from lte.training.batches import IGNORED
from lte.training.data import DataConfig, load_dataset_for, load_prompts

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and 1?"},
    {"role": "assistant", "content": "3"},
]
FIRST = "[system]Be brief.<eos>\n[user]1+1?<eos>\n[assistant]"
SECOND = FIRST + "2<eos>\n[user]and 1?<eos>\n[assistant]"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tokenizer():
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


def test_every_answer_is_a_row(tmp_path, tokenizer, caplog):
    source = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT[:2]}])
    config = DataConfig(messages="messages")
    assert load_prompts(source, config, tokenizer) == ([FIRST, SECOND], ["2", "3"])
    assert "1 of 2 chats have no answer of the assistant" in caplog.text


def test_the_loss_is_on_the_answer_alone(tmp_path, tokenizer):
    """What the template gives for the whole chat, to the token; labels on the last answer and its EOS."""
    source = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    row = load_dataset_for("generation", source, tokenizer, DataConfig(messages="messages"))[1]
    whole = tokenizer(SECOND + "3<eos>", return_tensors="pt")["input_ids"][0]
    assert torch.equal(row["input_ids"], whole)
    assert row["labels"].tolist() == [IGNORED] * (len(whole) - 2) + whole[-2:].tolist()


def test_prompt_and_completion(tmp_path, tokenizer, caplog):
    rows = [{"q": "1+1", "a": "2"}, {"q": "?", "a": " "}]
    config = DataConfig(chat=True, prompt="{q}?", completion="a")
    source = write(tmp_path / "a.jsonl", rows)
    assert load_prompts(source, config, tokenizer) == (["[user]1+1?<eos>\n[assistant]"], ["2"])
    assert "rows with an empty completion: skipped 1 of 2" in caplog.text


def test_what_ends_a_completion_is_not_put_into_the_template(tmp_path, tokenizer):
    config = DataConfig(chat=True, prompt="q", completion="a", completion_end="###")
    source = write(tmp_path / "a.jsonl", [{"q": "1", "a": "2###"}, {"q": "1", "a": "3<eos>"}])
    assert load_prompts(source, config, tokenizer)[1] == ["2", "3"]


def test_parts_of_text_are_a_text(tmp_path, tokenizer):
    parts = [{"type": "text", "text": "2"}, {"type": "text", "text": "!"}]
    source = write(tmp_path / "a.jsonl", [{"messages": [CHAT[1], {"role": "assistant", "content": parts}]}])
    assert load_prompts(source, DataConfig(messages="messages"), tokenizer)[1] == ["2!"]


def test_bos_once(tmp_path):
    """A template that writes BOS, and a tokenizer that adds it: one BOS."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(bos_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)])
    tokenizer.chat_template = "<pad>" + TEMPLATE
    source = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    row = load_dataset_for("generation", source, tokenizer, DataConfig(messages="messages"))[0]
    assert row["input_ids"].tolist().count(1) == 1


def test_an_end_of_turn_that_is_no_eos_is_learnt(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("<eos>", "<|end|>")
    source = write(tmp_path / "a.jsonl", [{"messages": CHAT[1:3]}])
    assert load_prompts(source, DataConfig(messages="messages"), tokenizer)[1] == ["2<|end|>"]


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, {"messages": CHAT}, "has no chat template"),
        (TEMPLATE, {"messages": "hello"}, "row 1: column 'messages' holds no chat"),
        (TEMPLATE, {"messages": [{"role": "user"}]}, "row 1: column 'messages' holds no chat"),
        (
            TEMPLATE,
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "row 1: a message's content is a list",
        ),
        (TEMPLATE, {"chat": CHAT}, "no column 'messages', the columns are 'chat'"),
        (TEMPLATE, {"messages": CHAT[:2]}, "none of 1 chats has an answer"),
        ("{{ messages | length }}", {"messages": CHAT}, "does not continue what it gave"),
        ("{{ raise_exception('roles must alternate') }}", {"messages": CHAT}, "refuses a chat: roles must alternate"),
    ],
)
def test_refused(tmp_path, template, row, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    source = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(source, DataConfig(messages="messages"), tokenizer)
    assert "\n" not in str(error.value)
