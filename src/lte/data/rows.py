"""Work on rows that every task needs: check them, warn of skipped ones, pad them."""

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
    """Return a collator that pads with the tokenizer's padding token, or with EOS if it has none."""
    pad: Any = tokenizer.pad_token_id
    return PaddingCollator(eos_id(tokenizer) if pad is None else pad, pad_to_multiple_of)


def check_token_ids(arrays: Iterable[np.ndarray], vocab_size: int, source: Source) -> None:
    """Raise ValueError unless the model has all these tokens."""
    highest = max((int(ids.max(initial=0)) for ids in arrays), default=0)
    if highest >= vocab_size:
        raise ValueError(
            f"{source}: token id {highest} is outside the vocabulary of {vocab_size}: "
            "tokenise with the tokenizer of the model"
        )


def warn_skipped(count: int, total: int, what: str) -> None:
    """Log that `count` of `total` rows were skipped, if any were. Raise ValueError if all rows were skipped."""
    if count == total:
        raise ValueError(f"{what}: all {total} rows were skipped, so nothing is left")
    if count:
        logger.warning("%s: skipped %d of %d", what, count, total)


def warn_cut(count: int, total: int, what: str, size: int) -> None:
    """Log how many rows were cut, if any were."""
    if count:
        logger.warning("%d of %d %s cut to sequence_length=%d", count, total, what, size)
