"""Completions of prompts: what was generated, row by row and without padding, and how sparse it was."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lte.inference.generate import generate
from lte.modules.recording import SparsityMeter, track_sparsity

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
"""Options of ``generate`` that a model's own settings must not win over."""


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt, without padding, on the CPU.

    Attributes:
        prompt: its token ids.
        start: what the decoder of an encoder-decoder begins with; empty for other models.
        new: the tokens generated, up to and with the one that ends the text.
        ended: whether there is such a token; otherwise the tokens allowed were used up.
    """

    prompt: Tensor
    start: Tensor
    new: Tensor
    ended: bool


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the model's, and the tokenizer's EOS, which is what training appends."""
    given = model.generation_config.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
    found = {*([given] if isinstance(given, int) else given or [])}
    eos: Any = tokenizer.eos_token_id
    return sorted(found if eos is None else found | {eos})


def complete(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], stops: Sequence[int], **options: Any
) -> list[Completion]:
    """:func:`lte.generate`, its rows taken apart.

    Args:
        model: on its device.
        inputs: ``input_ids`` and ``attention_mask`` of one or more prompts.
        stops: as :func:`stop_ids` gives them; none at all is fine.
        options: of :func:`lte.generate`.
    """
    end: dict[str, Any] = {"eos_token_id": list(stops)} if stops else {}
    end["forced_eos_token_id"] = None  # a text that is cut has not ended
    output = generate(model, inputs, **end, **options).cpu()
    begin = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    made = []
    for prompt, mask, row in zip(inputs["input_ids"], inputs["attention_mask"], output, strict=True):
        new = row[begin:]
        ends = torch.isin(new, torch.tensor(list(stops), dtype=new.dtype)).nonzero()
        start = row[:begin] if model.config.is_encoder_decoder else row[:0]
        new = new[: int(ends[0]) + 1] if len(ends) else new
        made.append(Completion(prompt[mask.bool()].cpu(), start, new, ended=len(ends) > 0))
    return made


def completions_sparsity(model: PreTrainedModel, completions: Sequence[Completion]) -> SparsityMeter:
    """Sparsity of prompts and new tokens, padding and what a batch computes for texts that have ended left out."""
    with track_sparsity(model.base_model) as meter:
        replay(model, completions)
    return meter


@torch.no_grad()
def replay(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    batch_size: int = 1,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> None:
    """Pass prompts and new tokens through ``model.base_model``, for those who watch it.

    A pass afterwards: watching while decoding would slow it down, and keep its steps from being compiled.
    """
    backbone = model.base_model  # the head would hold a vocabulary for every token
    for first in progress(range(0, len(completions), batch_size)):
        some = completions[first : first + batch_size]
        if model.config.is_encoder_decoder:
            inputs = padded([one.prompt for one in some])
            decoder = padded([torch.cat([one.start, one.new]) for one in some])
            inputs |= {f"decoder_{name}": value for name, value in decoder.items()}
        else:
            inputs = padded([torch.cat([one.prompt, one.new]) for one in some])
        backbone(**{name: value.to(model.device) for name, value in inputs.items()})


def padded(rows: Sequence[Tensor], side: Literal["left", "right"] = "right", token: int = 0) -> dict[str, Tensor]:
    """A batch of rows of token ids. Which token pads does not matter to the model: the mask says that it is none.

    On the right positions count from each row's first token, as in training; what is to be continued needs the left.
    """
    masks = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(list(rows), batch_first=True, padding_value=token, padding_side=side),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_side=side),
    }
