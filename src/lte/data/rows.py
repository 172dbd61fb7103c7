"""What every task does to rows: check them, say what was left out, pad them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lte.data.batches import PaddingCollator
from lte.data.sources import Source
from lte.data.tokenise import eos_id

logger = logging.getLogger(__name__)


def collator_for(tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int) -> PaddingCollator:
    """Pads with the tokenizer's padding, or EOS where it has none."""
    pad: Any = tokenizer.pad_token_id
    return PaddingCollator(eos_id(tokenizer) if pad is None else pad, pad_to_multiple_of)


def check_token_ids(arrays: Iterable[np.ndarray], vocab_size: int, source: Source) -> None:
    """ValueError for a token that the model does not have."""
    highest = max((int(ids.max(initial=0)) for ids in arrays), default=0)
    if highest >= vocab_size:
        raise ValueError(
            f"{source}: token id {highest} is outside the vocabulary of {vocab_size}: "
            "tokenise with the tokenizer of the model"
        )


def warn_skipped(count: int, total: int, what: str) -> None:
    """Log `count` of `total` skipped rows, if any; ValueError when they were all there was."""
    if count == total:
        raise ValueError(f"{what}: all {total}, nothing is left")
    if count:
        logger.warning("%s: skipped %d of %d", what, count, total)


def warn_cut(count: int, total: int, what: str, size: int) -> None:
    """Log how many rows lost a part, if any."""
    if count:
        logger.warning("%d of %d %s cut to sequence_length=%d", count, total, what, size)
