"""Turns chats into prompts and completions by the tokenizer's chat template. The loss is only on answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lte.argument_error import Argument, ArgumentError
from lte.data.tokenise import as_unicode

Chat = list[dict[str, Any]]
"""Messages in order, each with its `role`, its `content` (a text or None), and other keys that it has."""


def chat_in(value: Any, name: str, answer: Callable[[str], str] = str) -> Chat:
    """Return the chat in column `name`, without keys that are null. Raise ValueError if it is no chat.

    Args:
        answer: called with the text of each answer; its result replaces the text.
    """
    chat: list[Any] = value if isinstance(value, list) else [None]
    if not all(isinstance(one, dict) and one.get("role") is not None and len(one) > 1 for one in chat):
        raise ValueError(
            f"column {name!r} holds no chat: a list of messages with role and content is needed (in .jsonl, .json or "
            ".parquet)"
        )
    found = Chat()
    for message in chat:
        content = _text_of(message.get("content"))
        if content is not None and message["role"] == "assistant":
            content = answer(content)
        found.append({**{key: one for key, one in message.items() if one is not None}, "content": content})
    return found


def tools_in(value: Any) -> list[Any] | None:
    """Return the tools that a chat may call, from a list or its JSON. Raise ValueError for anything else."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError("column 'tools' holds a text that is not JSON") from error
    if value and not isinstance(value, list):
        raise ValueError(f"column 'tools' holds a {type(value).__name__}, but a list of tools is needed")
    return value or None


def _text_of(content: Any) -> str | None:
    """Return the text of a message. Parts of text are joined."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str | None):
        raise ValueError(f"a message's content is a {type(content).__name__}, but a text is needed")
    return content


def pair_to_chat(prompt: str, completion: str) -> Chat:
    """A user's message and the assistant's answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


class ChatTemplate:
    """A tokenizer's chat template. Raise ValueError if the tokenizer has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None):
        if tokenizer is None:
            raise ValueError("chats need the tokenizer, for its template: load_prompts(sources, config, tokenizer)")
        if not getattr(tokenizer, "chat_template", None):
            raise ArgumentError(
                "the tokenizer has no chat template: give prompt and completion, without ",
                *(Argument("chat"), " or ", Argument("messages")),
            )
        self._tokenizer: Any = tokenizer

    def render(self, chat: Chat, **options: Any) -> str:
        """Return the text of a chat. Raise ValueError if the template refuses it or the text is not valid Unicode."""
        try:
            text = self._tokenizer.apply_chat_template(chat, tokenize=False, **options)
        except Exception as error:  # a template is a program of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the chat template of {self._tokenizer.name_or_path} refuses a chat: {reason}") from error
        return as_unicode(text)

    def answers(self, chat: Chat, tools: list[Any] | None = None) -> list[tuple[str, str]]:
        """Return (prompt, completion) for each answer. The prompt is all text before the assistant speaks.

        An end of turn is a part of the answer. An empty answer is "", without the template's end of turn. Messages of
        the assistant at the start of a chat are context, because they answer nothing.

        Raise ValueError if the template changes earlier turns, refuses the chat, or does not write its tool calls.
        """
        places = [i for i, message in enumerate(chat) if i and message["role"] == "assistant"]
        names = [_called(chat[i]) for i in places]
        problems = list[ValueError]()
        for blank in ("", None) if any(names) else ("",):  # templates write a call beside the content or instead of it
            turns = [{**one, "content": one["content"] or (blank if _called(one) else "")} for one in chat]
            try:
                found = [self._answer(turns, i, tools) for i in places]
            except ValueError as error:
                problems.append(error)
                continue
            if all(name in answer for (_, answer), called in zip(found, names, strict=True) for name in called):
                return found
            problems.append(ValueError("the chat template does not write an answer's tool calls"))
        raise problems[0]

    def _answer(self, chat: Chat, place: int, tools: list[Any] | None) -> tuple[str, str]:
        before, message = chat[:place], chat[place]
        prompt, completion = self._split(before, message, tools)
        if not (message["content"] or "").strip() and not _called(message):
            nothing = {"role": message["role"], "content": message["content"]}
            if completion == self._split(before, nothing, tools)[1]:
                return prompt, ""
        return prompt, completion

    def _split(self, before: Chat, message: dict[str, Any], tools: list[Any] | None) -> tuple[str, str]:
        prompt = self.render(before, add_generation_prompt=True, tools=tools)
        whole = self.render([*before, message], tools=tools)
        if not whole.startswith(prompt):
            raise ValueError(
                "this chat template changes the text of earlier turns, so answers cannot be told from prompts: give "
                "prompt and completion as templates of your own"
            )
        return prompt, whole[len(prompt) :].rstrip()


def _called(message: dict[str, Any]) -> Sequence[str]:
    """The names of the tools that a message calls."""
    try:
        return [str((call.get("function") or call)["name"]) for call in message.get("tool_calls") or ()]
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError("a message's tool_calls are no list of functions with names") from error
