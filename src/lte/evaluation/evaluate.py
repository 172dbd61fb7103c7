"""Quality, sparsity and cost of a model, measured in the same forward passes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lte.evaluation.measuring import Spent, measure, spent


@dataclass(kw_only=True)
class Evaluation(Spent):
    """What an evaluation measured.

    Attributes:
        loss: mean negative log-likelihood of the labels, in nats.
        perplexity: ``exp(loss)``; None for classification.
        accuracy: share of right classes; None for language modelling.
        num_tokens: labels predicted (classification: rows).
    """

    loss: float
    perplexity: float | None
    accuracy: float | None
    num_tokens: int


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    dataset: Any,
    batch_size: int = 8,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Evaluation:
    """Run ``model`` over ``dataset`` in its present mode and measure.

    Args:
        model: with a language modelling head, or a classification head. On any device.
        dataset: as from ``lte.training.data``: rows, and a ``collator``. Labels of -100 are not counted.
        batch_size: rows a forward pass.
        progress: wraps the iteration over batches.

    Raises:
        ValueError: no label to predict.
    """
    was_training = model.training
    model.eval()
    loss, right, count, classifies = 0.0, 0, 0, False
    shifted = not model.config.is_encoder_decoder
    with measure(model) as meter:
        for batch in progress(DataLoader(dataset, batch_size=batch_size, collate_fn=dataset.collator)):
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            labels = inputs["labels"]
            logits = model(**inputs).logits
            classifies = logits.ndim == 2
            if logits.ndim == 3 and shifted:
                logits, labels = logits[:, :-1], labels[:, 1:]
            for row_logits, row_labels in zip(logits, labels.reshape(len(logits), -1), strict=True):
                row = row_logits.reshape(len(row_labels), -1).float()  # a row at a time: a vocabulary in fp32 is large
                loss += F.cross_entropy(row, row_labels, ignore_index=-100, reduction="sum").item()
                right += int((row.argmax(-1) == row_labels).sum())
                count += int((row_labels != -100).sum())
    model.train(was_training)
    if count == 0:
        raise ValueError("the data holds no label to predict: give more text")
    return Evaluation(
        loss=loss / count,
        perplexity=None if classifies else math.exp(min(loss / count, 700)),
        accuracy=right / count if classifies else None,
        num_tokens=count,
        **vars(spent(model, meter)),
    )
