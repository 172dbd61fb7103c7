"""Quality, sparsity and cost of a model, measured in the same forward passes."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lte.evaluation.class_metrics import of_classes, of_numbers
from lte.evaluation.measuring import Spent, check_finite, measure, spent
from lte.surgery.loading import check_causal


@dataclass(kw_only=True)
class Evaluation(Spent):
    """What an evaluation measured.

    Attributes:
        loss: mean negative log-likelihood of the labels, in nats; of regression the mean squared error.
        perplexity: ``exp(loss)``; None for classification and regression.
        accuracy, matthews: share of right classes, and Matthews correlation; None but for classification.
        f1: of the second of two classes; None but for two.
        pearson, spearman: correlation with the labels; None but for regression.
        num_tokens: labels predicted (classification and regression: rows).
    """

    loss: float
    perplexity: float | None
    num_tokens: int
    accuracy: float | None = None
    f1: float | None = None
    matthews: float | None = None
    pearson: float | None = None
    spearman: float | None = None


_MAX_LOGITS = 2**29
"""Of one forward pass: 2 GB in fp32."""


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    dataset: Any,
    batch_size: int = 8,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Evaluation:
    """Run ``model`` over ``dataset`` in its present mode and measure.

    Args:
        model: with a language modelling head, or one that classifies; with one output it is a regression. On any
            device.
        dataset: as from ``lte.data.tasks``: rows, and a ``collator``. Labels of -100 are not counted.
        batch_size: rows a forward pass; fewer where their logits over the vocabulary would take gigabytes.
        progress: wraps the iteration over batches.

    Raises:
        ValueError: no label to predict, a language model that sees what it has to predict, outputs that are not finite.
    """
    was_training = model.training
    model.eval()
    loss, count = 0.0, 0
    shifted = not model.config.is_encoder_decoder
    labelled: list[tuple[Tensor, Tensor]] = []  # logits [B, C] and labels [B], of a head that has one answer a row
    with measure(model) as meter:
        batches = progress(DataLoader(dataset, batch_size=batch_size, collate_fn=dataset.collator))
        for inputs in _passes(model, batches):
            labels = inputs.pop("labels") if shifted else inputs["labels"]  # a decoder's inputs are made of them
            logits = model(**inputs).logits
            if logits.ndim == 2:
                real = labels.is_floating_point() | (labels != -100)  # a regression may have any number
                labelled.append((logits[real].float().cpu(), labels[real].cpu()))
                continue
            if shifted:
                check_causal(model.config, "perplexity asks")
                logits, labels = logits[:, :-1], labels[:, 1:]
            for row, row_labels in zip(logits, labels, strict=True):  # one at a time: a vocabulary in fp32 is large
                loss += F.cross_entropy(row.float(), row_labels, ignore_index=-100, reduction="sum").item()
                count += int((row_labels != -100).sum())
    model.train(was_training)
    count += sum(len(labels) for _, labels in labelled)
    if count == 0:
        raise ValueError("the data holds no label to predict: give more text")
    check_finite(model, torch.tensor(loss))
    if labelled:
        logits, labels = (torch.cat(parts) for parts in zip(*labelled, strict=True))
        check_finite(model, logits)
        quality = label_metrics(logits, labels)
    else:
        quality = {"loss": loss / count, "perplexity": math.exp(min(loss / count, 700))}
    return Evaluation(**quality, num_tokens=count, **vars(spent(model, meter)))


def _passes(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Batches ``[B, T]`` on the model's device, in parts whose logits stay within ``_MAX_LOGITS``."""
    head = model.get_output_embeddings()
    for batch in batches:
        B, labels = len(batch["labels"]), batch["labels"][0].numel()
        rows = max(1, _MAX_LOGITS // (labels * head.weight.shape[0])) if isinstance(head, nn.Linear) else B
        for start in range(0, B, rows):
            part = slice(start, start + rows)
            yield {
                name: (value[part] if value.ndim and len(value) == B else value).to(model.device)
                for name, value in batch.items()
            }


def label_metrics(logits_BC: Tensor, labels_B: Tensor) -> dict[str, Any]:
    """Loss and GLUE's metrics: of classes ``[B]``, or, where there is one output, of numbers ``[B]``."""
    if logits_BC.shape[1] == 1:
        predicted_B = logits_BC[:, 0]
        return {
            "loss": F.mse_loss(predicted_B, labels_B.float()).item(),
            "perplexity": None,
            **of_numbers(predicted_B, labels_B),
        }
    return {
        "loss": F.cross_entropy(logits_BC, labels_B).item(),
        "perplexity": None,
        **of_classes(logits_BC.argmax(-1), labels_B, logits_BC.shape[1]),
    }
