"""Completions of prompts, one for each row and without padding, and their sparsity."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lte.inference.generate import generate
from lte.modules.recording import track_sparsity
from lte.modules.sparsity_meter import SparsityMeter

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
"""Options of ``generate`` for greedy decoding, whatever a model's own settings are."""


@dataclass(frozen=True)
class Completion:
    """The tokens generated for one prompt, without padding, on the CPU.

    Attributes:
        prompt: its token ids.
        start: the tokens that the decoder of an encoder-decoder begins with; empty for other models.
        new: the generated tokens, including the one that ends the text.
        ended: whether there is such a token. If not, the text has the highest allowed number of tokens.
    """

    prompt: Tensor
    start: Tensor
    new: Tensor
    ended: bool


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text: those of the model, and the tokenizer's EOS, which training appends."""
    given = model.generation_config.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
    found = {*([given] if isinstance(given, int) else given or [])}
    eos: Any = tokenizer.eos_token_id
    return sorted(found if eos is None else found | {eos})


def complete(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], stops: Sequence[int], **options: Any
) -> list[Completion]:
    """Continue prompts by :func:`lte.generate` and return one completion for each.

    Args:
        model: on its device.
        inputs: ``input_ids`` and ``attention_mask`` of one or more prompts.
        stops: as :func:`stop_ids` returns them; may be empty.
        options: of :func:`lte.generate`.
    """
    end: dict[str, Any] = {"eos_token_id": list(stops)} if stops else {}
    end["forced_eos_token_id"] = None  # a text that is cut off has not ended
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
    """Return the sparsity of prompts and new tokens. Padding and tokens after the end of a text do not count."""
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
    """Pass prompts and new tokens through ``model.base_model``, so that the pass can be recorded.

    This is a pass after decoding. To record while decoding would slow it down and prevent compiled steps.
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
    """Return rows of token ids as one padded batch. The padding token does not matter, because the mask excludes it.

    With padding on the right, positions count from each row's first token, as in training. Prompts that are to be
    continued need padding on the left.
    """
    masks = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(list(rows), batch_first=True, padding_value=token, padding_side=side),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_side=side),
    }
