"""Quality, sparsity and cost of a model, measured in the same forward passes."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lte.modules.recording import SparsityMeter, track_sparsity
from lte.surgery.cost import cost_per_token


@dataclass
class Evaluation:
    """What an evaluation measured.

    Attributes:
        loss: mean negative log-likelihood of the labels, in nats.
        perplexity: ``exp(loss)``; None for classification.
        accuracy: share of right classes; None for language modelling.
        sparsity: fraction of inactive neurons, mean over tokens and layers; 0 for a dense model.
        layer_sparsity: the same, layer by layer.
        num_tokens: labels predicted (classification: rows).
        gflops_per_token, gflops_per_token_dense: FFN, attention projections and routers, G = 2^30.
        mode: dense, soft or hard.
    """

    loss: float
    perplexity: float | None
    accuracy: float | None
    sparsity: float
    layer_sparsity: list[float]
    num_tokens: int
    gflops_per_token: float
    gflops_per_token_dense: float
    mode: str = "dense"


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
    sparse = hasattr(model.config, "lte")
    was_training = model.training
    model.eval()
    loss, right, count, classifies = 0.0, 0, 0, False
    shifted = not model.config.is_encoder_decoder
    meter = SparsityMeter()
    with track_sparsity(model) if sparse else nullcontext(meter) as meter:
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
    sparsity = meter.overall if sparse else 0.0
    return Evaluation(
        loss=loss / count,
        perplexity=None if classifies else math.exp(min(loss / count, 700)),
        accuracy=right / count if classifies else None,
        sparsity=sparsity,
        layer_sparsity=meter.by_layer,
        num_tokens=count,
        gflops_per_token=cost_per_token(model, meter.by_layer if sparse else 0.0).gflops,
        gflops_per_token_dense=cost_per_token(model, 0.0).gflops,
        mode=model.config.lte["mode"] if sparse else "dense",
    )
