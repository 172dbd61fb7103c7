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
    """The result of an evaluation.

    Attributes:
        loss: mean negative log-likelihood of the labels, in nats. For regression it is the mean squared error.
        perplexity: ``exp(loss)``; None for classification and regression.
        accuracy, matthews: share of right classes, and Matthews correlation. Only for classification, else None.
        f1: of the second class. Only with two classes, else None.
        pearson, spearman: correlation with the labels. Only for regression, else None.
        num_tokens: number of predicted labels (rows in classification and regression).
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
"""The most logits of one forward pass: 2 GB in fp32."""


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    dataset: Any,
    batch_size: int = 8,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Evaluation:
    """Run ``model`` over ``dataset`` in its current mode and measure it.

    Args:
        model: a model with a head for language modelling or classification, on any device. A classifier with one
            output is a regression.
        dataset: rows and a ``collator``, as from ``lte.data.tasks``. Labels of -100 do not count.
        batch_size: rows of a forward pass. It is reduced if logits over the vocabulary would take gigabytes.
        progress: wraps the iteration over batches.

    Raises:
        ValueError: there is no label to predict, the language model sees the labels, or outputs are not finite.
    """
    was_training = model.training
    model.eval()
    loss, count = 0.0, 0
    shifted = not model.config.is_encoder_decoder
    labelled: list[tuple[Tensor, Tensor]] = []  # logits [B, C] and labels [B] of a head with one answer for each row
    with measure(model) as meter:
        batches = progress(DataLoader(dataset, batch_size=batch_size, collate_fn=dataset.collator))
        for inputs in _passes(model, batches):
            labels = (
                inputs.pop("labels") if shifted else inputs["labels"]
            )  # the decoder's inputs are made of the labels
            logits = model(**inputs).logits
            if logits.ndim == 2:
                real = labels.is_floating_point() | (labels != -100)  # a regression may have any number
                labelled.append((logits[real].float().cpu(), labels[real].cpu()))
                continue
            if shifted:
                check_causal(model.config, "perplexity asks")
                logits, labels = logits[:, :-1], labels[:, 1:]
            for row, row_labels in zip(logits, labels, strict=True):  # one row at a time: logits in fp32 are large
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
    """Give batches ``[B, T]`` on the model's device, in parts with at most ``_MAX_LOGITS`` logits."""
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
    """Return loss and GLUE's metrics of classes ``[B]``, or of numbers ``[B]`` if there is one output."""
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
