"""The datasets that a `transformers.Trainer` reads: packed blocks and padded rows. Also how to hold a part out.

Shapes: B rows a batch, S tokens a block, L tokens of a row, or of the longest row of a batch.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Subset

from lte.data.mapped_ids import MappedIds
from lte.data.stored_columns import StoredColumn

IGNORED = -100  # the loss ignores this label
_LOOKED_AT = 1 << 22  # tokens at once, in the search for blocks


class PackedBlocks(Dataset[dict[str, Tensor]]):
    """A stream of token ids cut into blocks of S; the last incomplete block is left out.

    Row: {"input_ids": (S,) int64, "labels": (S,) int64}; the model shifts the labels. No attention_mask, as every
    token is real. `ids` are the tokens of these blocks, uint16 or uint32: an array, maybe a file, or Arrow files.

    Each block begins with `bos`, as each text of the tokenizer does. The next S - 1 tokens of the stream follow. If the
    stream has a document's BOS at that place, that BOS begins the block. A BOS is context and no label, unless it is
    also `eos` and ends a document. So every other token of the stream is predicted exactly once. Without `bos`, labels
    are the ids, and the first token of a block is only context.
    """

    class_names = None

    def __init__(
        self, ids: np.ndarray | MappedIds, sequence_length: int, bos: Sequence[int] = (), eos: int | None = None
    ):
        self.sequence_length = sequence_length
        self.bos = tuple(bos)
        if sequence_length <= len(self.bos):
            raise ValueError(f"sequence_length is {sequence_length}, all of it BOS: give at least {len(self.bos) + 1}")
        self._context = torch.tensor([token for token in self.bos if token != eos], dtype=torch.long)
        self._starts, stop = _block_starts(ids, sequence_length, self.bos)
        if not len(self._starts):
            raise ValueError(
                f"the sources hold {len(ids)} tokens, fewer than one block of sequence_length="
                f"{sequence_length}: give more text or a sequence_length of at most {len(ids)}"
            )
        self.ids = ids[:stop]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = int(self._starts[index])
        text = np.asarray(self.ids[start : start + self.sequence_length]).astype(np.int64)
        own = () if tuple(text[: len(self.bos)].tolist()) == self.bos else self.bos
        text = text[: self.sequence_length - len(own)]
        block = torch.from_numpy(np.concatenate([np.array(own, dtype=np.int64), text]))
        labels = block.masked_fill(torch.isin(block, self._context), IGNORED)
        labels[: len(self.bos)] = IGNORED
        return {"input_ids": block, "labels": labels}

    def head(self, count: int) -> PackedBlocks:
        """A dataset of the first `count` blocks."""
        return self.select(range(min(count, len(self))))

    def select(self, indices: Iterable[int]) -> PackedBlocks:
        """A dataset of the blocks at `indices`, in that order. It is a copy, unless the blocks are consecutive."""
        order = np.array(list(indices), dtype=np.int64)
        bounds = np.append(self._starts, len(self.ids))
        chosen = copy.copy(self)
        if np.array_equal(order, np.arange(order[0], order[0] + len(order))):
            first, last = order[0], order[-1]
            chosen.ids = self.ids[bounds[first] : bounds[last + 1]]
            chosen._starts = self._starts[first : last + 1] - bounds[first]
        else:
            chosen.ids = np.concatenate([self.ids[bounds[i] : bounds[i + 1]] for i in order])
            chosen._starts = np.append(0, (bounds[order + 1] - bounds[order]).cumsum()[:-1])
        return chosen

    @staticmethod
    def collator(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack rows of (S,) to (B, S)."""
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _block_starts(ids: np.ndarray | MappedIds, sequence_length: int, bos: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """Return where blocks start in the stream, int64, and where the last block ends."""
    if not bos:
        count = len(ids) // sequence_length
        return np.arange(count) * sequence_length, count * sequence_length
    starts, start = array("q"), 0
    for first in range(0, len(ids), _LOOKED_AT):
        begins = _begins(ids, first, bos)
        while start < min(first + _LOOKED_AT, len(ids)):
            starts.append(start)
            start += sequence_length - (0 if begins[start - first] else len(bos))
    if start > len(ids):
        start = starts.pop()
    return np.array(starts, dtype=np.int64), start


def _begins(ids: np.ndarray | MappedIds, first: int, bos: tuple[int, ...]) -> bytes:
    """Return a byte for each of `_LOOKED_AT` places from `first` on: 1 if a BOS is there."""
    stop = first + _LOOKED_AT + len(bos) - 1
    window = ids[first:stop] if isinstance(ids, np.ndarray) else ids.read(first, stop)
    found, places = np.zeros(len(window), dtype=bool), max(0, len(window) - len(bos) + 1)
    found[:places] = np.all([window[i : i + places] == token for i, token in enumerate(bos)], axis=0)
    return found.tobytes()


class PaddedRows(Dataset[dict[str, Tensor]]):
    """Rows of different lengths, kept as small arrays or on disk. `collator` pads them when they become a batch.

    Row: {"input_ids": (L,), "labels": (L,) or ()} int64, and "token_type_ids" (L,) where the tokenizer has
    them. Labels of regression are () float32. Rows may have no labels. `class_names` are the labels in order of
    their ids for classification, one name for regression, and None for generation.
    """

    def __init__(
        self,
        columns: Mapping[str, Sequence[Any]],
        collator: PaddingCollator,
        class_names: tuple[str, ...] | None = None,
    ):
        self.columns: dict[str, Sequence[Any]] = {name: _small(values) for name, values in columns.items()}
        self.collator = collator
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {name: values[index] for name, values in self.columns.items()}
        return {
            name: torch.tensor(value if value.dtype == np.float32 else value.astype(np.int64))
            for name, value in row.items()
        }

    def head(self, count: int) -> PaddedRows:
        """A dataset of the first `count` rows."""
        return self.select(range(min(count, len(self))))

    def select(self, indices: Iterable[int]) -> PaddedRows:
        """A dataset of the rows at `indices`, in that order."""
        order = list(indices)
        columns = {
            name: values.select(order) if isinstance(values, StoredColumn) else [values[i] for i in order]
            for name, values in self.columns.items()
        }
        return PaddedRows(columns, self.collator, self.class_names)


def _small(values: Sequence[Any]) -> Sequence[Any]:
    """Each value as an array of 32 bits. Values on disk have this form already."""
    if isinstance(values, StoredColumn):
        return values
    arrays = map(np.asarray, values)
    return [one.astype(np.float32 if one.dtype.kind == "f" else np.int32, copy=False) for one in arrays]


@dataclass(frozen=True)
class PaddingCollator:
    """Pad rows on the right to the longest: input_ids with `pad_token_id`, labels with -100, the rest 0.

    Gives (B, L) int64 for each, labels (B,) where they are classes, and attention_mask (B, L), 0 on padding. L is a
    multiple of `pad_to_multiple_of`.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        padding = {"input_ids": self.pad_token_id, "labels": IGNORED}
        batch: dict[str, Tensor] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            batch[name] = self._pad(values, padding.get(name, 0)) if values[0].dim() else torch.stack(values)
        return {**batch, "attention_mask": self._pad([torch.ones_like(row["input_ids"]) for row in rows], 0)}

    def _pad(self, values: list[Tensor], padding: int) -> Tensor:
        padded_BL = pad_sequence(values, batch_first=True, padding_value=padding)
        return F.pad(padded_BL, (0, -padded_BL.shape[1] % self.pad_to_multiple_of), value=padding)


AnyTaskDataset = TypeVar("AnyTaskDataset", PackedBlocks, PaddedRows)


def split_held_out(dataset: AnyTaskDataset, held_out: float, seed: int = 0) -> tuple[AnyTaskDataset, AnyTaskDataset]:
    """(training, held-out) parts of a dataset; `held_out` below 1 is a fraction, else a count.

    Of packed blocks, the last ones are held out, so that at most one document has a part on both sides. Of rows, a
    random choice by `seed` is held out. Rows with the same prompt may be on both sides. Raise ValueError if a part is
    empty.
    """
    total = len(dataset)
    count = max(1, round(held_out * total)) if 0 < held_out < 1 else int(held_out)
    if not 0 < count < total or (held_out >= 1 and count != held_out):
        raise ValueError(f"cannot hold out {held_out} of {total} rows: give a fraction or 1 to {total - 1}")
    if isinstance(dataset, PackedBlocks):
        return dataset.select(range(total - count)), dataset.select(range(total - count, total))
    order = np.random.default_rng(seed).permutation(total).tolist()
    return dataset.select(sorted(order[count:])), dataset.select(sorted(order[:count]))


def two_samples(dataset: AnyTaskDataset, rows: int, seed: int) -> tuple[AnyTaskDataset, AnyTaskDataset]:
    """Rows to calibrate on and others to measure on, drawn from all over the data, so that the two are alike.

    There are `rows` of each, or half of the data each where it holds fewer; ValueError where it is one row.
    """
    if len(dataset) < 2:
        raise ValueError("the data is one row, but one to calibrate on and one to measure on are needed: give more")
    count = min(rows, len(dataset) // 2)
    order = np.random.default_rng(seed).permutation(len(dataset))[: 2 * count].tolist()
    return dataset.select(sorted(order[:count])), dataset.select(sorted(order[count:]))


def hold_out_for_calibration(dataset: Any, rows: int, seed: int) -> tuple[Any, Any]:
    """(training, held-out) rows of any dataset. At most a twentieth is held out; if that is no row, both get all rows.

    Raises:
        ValueError: a dataset without length.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "train_dataset has no length, so no rows of it can be kept out for thresholds: give calibration_dataset=..."
        )
    rows = min(rows, len(dataset) // 20)
    if rows == 0:
        return dataset, dataset
    if isinstance(dataset, PackedBlocks | PaddedRows):
        return split_held_out(cast(PackedBlocks, dataset), rows, seed)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(dataset, sorted(order[rows:])), Subset(dataset, sorted(order[:rows]))
