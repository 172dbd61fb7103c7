"""Chats to prompts and completions, through the tokenizer's chat template: the loss is on answers alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lte.training.columns import column
from lte.training.sources import Row, Source
from lte.training.tokenise import wrapping

logger = logging.getLogger(__name__)

Chat = list[dict[str, Any]]
"""Messages in order, each with its `role` and `content`."""


def chats_of(rows: Sequence[Row], name: str, source: Source) -> list[Chat]:
    """One column of chats, their contents as text; ValueError for a value that is none."""
    chats = column(rows, name, source)
    for number, chat in enumerate(chats, 1):
        if not isinstance(chat, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in chat):
            raise ValueError(
                f"{source}: row {number}: column {name!r} holds no chat: a list of messages with role and content is "
                "needed (in .jsonl, .json or .parquet)"
            )
    return [
        [{**message, "content": _text_of(message["content"], f"{source}: row {number}")} for message in chat]
        for number, chat in enumerate(chats, 1)
    ]


def _text_of(content: Any, where: str) -> str | None:
    """What a message says; parts of text are put together."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str | None):
        raise ValueError(f"{where}: a message's content is a {type(content).__name__}, a text is needed")
    return content


def pairs_to_chats(prompts: Sequence[str], completions: Sequence[str]) -> list[Chat]:
    """A user's message and the assistant's answer each."""
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def render_chats(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """(prompts, completions): of each answer in a chat what comes before it, up to where the assistant speaks, and it.

    An end of turn that is no EOS stays part of the answer. Chats without an answer are left out, counted and warned of.

    Raises: ValueError for a tokenizer without a template, one that does not go from left to right (it rewrites earlier
    turns), a chat that the template refuses, chats without any answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: give prompt and completion, without --chat or --messages")
    adds_bos, bos = bool(wrapping(tokenizer)[0]), str(tokenizer.bos_token or "")
    prompts, completions, silent = [], [], 0
    for chat in chats:
        answers = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        silent += not answers
        for i in answers:
            before = _rendered(tokenizer, chat[:i], add_generation_prompt=True)
            whole = _rendered(tokenizer, chat[: i + 1])
            if not whole.startswith(before):
                raise ValueError(
                    "this chat template does not continue what it gave for the turns before, so answers cannot be told "
                    "from prompts: give prompt and completion as templates of your own"
                )
            prompts.append(before.removeprefix(bos) if adds_bos else before)
            completions.append(whole[len(before) :].rstrip())
    if silent == len(chats):
        raise ValueError(f"none of {len(chats)} chats has an answer of the assistant: there is nothing to learn")
    if silent:
        logger.warning("%d of %d chats have no answer of the assistant: skipped", silent, len(chats))
    return prompts, completions


def _rendered(tokenizer: Any, chat: Chat, **options: Any) -> str:
    from jinja2 import TemplateError  # transformers has it wherever it renders templates

    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a chat: {error}") from error
