"""Chat templates: which tokens are prompt, which are answer, turn by turn."""

import json

import pytest
import torch

from byte_tokenizer import byte_tokenizer, with_bos
from lte.data.batches import IGNORED
from lte.data.prompts import load_prompts
from lte.data.tasks import DataConfig, load_dataset_for

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


@pytest.mark.parametrize("place", [0, 2, 3])
def test_half_a_character_is_named_with_its_row(tmp_path, tokenizer, place):
    chat = [{**one, "content": "a\ud800"} if index == place else one for index, one in enumerate(CHAT)]
    source = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": chat}])
    with pytest.raises(ValueError, match=r"a\.jsonl: row 2: a text is not valid Unicode"):
        load_prompts(source, DataConfig(messages="messages"), tokenizer)


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
    tokenizer = with_bos()
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
        (TEMPLATE, {"messages": [{"role": None, "content": "a"}]}, "row 1: column 'messages' holds no chat"),
        (
            TEMPLATE,
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "row 1: a message's content is a list",
        ),
        (TEMPLATE, {"chat": CHAT}, "no column 'messages', the columns are 'chat'"),
        (TEMPLATE, {"messages": CHAT[:2]}, "none of 1 chats has an answer"),
        ("{{ messages | length }}", {"messages": CHAT}, "changes the text of earlier turns"),
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


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
CALLS = [CHAT[1], CALL, {"role": "tool", "content": "2"}, CHAT[2]]
BESIDE = (  # as most templates with tools: the content, then the calls
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] + '' }}"
    "{% for c in m['tool_calls'] %}<call>{{ c['function']['name'] }}</call>{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
IN_PLACE = (  # as others: a call is a message without content
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m.get('content') is none %}<call>{{ m['tool_calls'][0]['function']['name'] }}</call>"
    "{% else %}{{ m['content'] }}{% endif %}<eos>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def asked(answer, **more):
    return {"messages": [CHAT[1], {"role": "assistant", "content": answer, **more}]}


def test_the_end_of_turn_of_the_template_is_nothing_to_warn_of(tmp_path, tokenizer, caplog):
    tokenizer.chat_template = CHATML
    source = write(tmp_path / "a.jsonl", [asked("2")])
    for end in (None, "<|im_end|>"):  # which is in no answer, and not to be taken from what the template writes
        config = DataConfig(messages="messages", completion_end=end)
        assert load_prompts(source, config, tokenizer)[1] == ["2<|im_end|>"]
        assert "im_end" not in caplog.text


def test_a_marker_of_another_model_is_warned_of_and_removed(tmp_path, tokenizer, caplog):
    tokenizer.chat_template = CHATML
    source = write(tmp_path / "a.jsonl", [asked("2</s>"), asked("3<eos>")])
    assert load_prompts(source, DataConfig(messages="messages"), tokenizer)[1] == ["2</s><|im_end|>", "3<|im_end|>"]
    assert "1 completions end with the text '</s>'" in caplog.text
    caplog.clear()
    config = DataConfig(messages="messages", completion_end="</s>")
    assert load_prompts(source, config, tokenizer)[1] == ["2<|im_end|>", "3<|im_end|>"]
    assert not caplog.records


@pytest.mark.parametrize("template", [CHATML, TEMPLATE, BESIDE, IN_PLACE])
@pytest.mark.parametrize("nothing", ["", " \n", None, []])
def test_answers_of_nothing_are_not_learnt(tmp_path, tokenizer, caplog, template, nothing):
    tokenizer.chat_template = template
    source = write(tmp_path / "a.jsonl", [asked("2"), asked(nothing), asked("3", tool_calls=None)])
    assert [one[0] for one in load_prompts(source, DataConfig(messages="messages"), tokenizer)[1]] == ["2", "3"]
    assert "rows with an empty completion: skipped 1 of 3" in caplog.text
    with pytest.raises(ValueError, match="empty completion: all 1 rows were skipped"):
        load_prompts(write(tmp_path / "b.jsonl", [asked(nothing)]), DataConfig(messages="messages"), tokenizer)


@pytest.mark.parametrize("template", [BESIDE, IN_PLACE])
def test_tool_calls_are_answers(tmp_path, tokenizer, template):
    tokenizer.chat_template = template
    call = {key: value for key, value in CALL.items() if key != "content"}
    for first in (CALL, {**CALL, "content": ""}, call):
        source = write(tmp_path / "a.jsonl", [{"messages": [CHAT[1], first, *CALLS[2:]]}])
        prompts, answers = load_prompts(source, DataConfig(messages="messages"), tokenizer)
        assert answers == ["<call>add</call>", "2"]
        assert prompts[1] == "[user]1+1?<eos>[assistant]<call>add</call><eos>[tool]2<eos>[assistant]"


def test_what_is_said_first_is_context(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "Hello!"}, *CHAT[1:3]]}])
    prompts = ["[assistant]Hello!<eos>\n[user]1+1?<eos>\n[assistant]"]
    assert load_prompts(source, DataConfig(messages="messages"), tokenizer) == (prompts, ["2"])


@pytest.mark.parametrize("written", [lambda tools: tools, json.dumps])
def test_tools_go_to_the_template(tmp_path, tokenizer, written):
    tokenizer.chat_template = BESIDE
    tools = [{"name": "add"}]
    source = write(tmp_path / "a.jsonl", [{"messages": CALLS, "tools": written(tools)}])
    prompts, _ = load_prompts(source, DataConfig(messages="messages"), tokenizer)
    assert prompts[0] == '[tools][{"name": "add"}][user]1+1?<eos>[assistant]'


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (CHATML, {"messages": CALLS}, "does not write an answer's tool calls"),
        (TEMPLATE, {"messages": CALLS}, "does not write an answer's tool calls"),
        (BESIDE, asked("", tool_calls="add()"), "tool_calls are no list of functions with names"),
        (BESIDE, {**asked("2"), "tools": "add"}, "column 'tools' holds a text that is not JSON"),
        (BESIDE, {**asked("2"), "tools": 3}, "column 'tools' holds a int, but a list of tools is needed"),
        (CHATML, {"messages": [{"role": 3, "content": "?"}, CHAT[2]]}, "refuses a chat: can only concatenate"),
        (CHATML, {"messages": [{"from": "human", "value": "?"}]}, "column 'messages' holds no chat"),
        (CHATML, {"messages": [{"role": "user", "content": {"a": 1}}]}, "a message's content is a dict"),
    ],
)
def test_bad_chats_are_named_by_their_row_or_skipped(tmp_path, tokenizer, caplog, template, row, message):
    tokenizer.chat_template = template
    source = write(tmp_path / "a.jsonl", [asked("2"), row])
    with pytest.raises(ValueError, match=f"a.jsonl: row 2: .*{message}") as error:
        load_prompts(source, DataConfig(messages="messages"), tokenizer)
    assert "\n" not in str(error.value)
    skipping = DataConfig(messages="messages", skip_bad_rows=True)
    assert len(load_prompts(source, skipping, tokenizer)[1]) == 1
    assert "skipped 1 of 2 chats, the first for this" in caplog.text
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path / "b.jsonl", [row]), skipping, tokenizer)
