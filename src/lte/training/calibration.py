"""Meeting a sparsity when routers are fixed: one shift of all thresholds, measured on data."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lte.modules.recording import record_scores, sparse_layers

_PASSES = 2  # moving one layer's threshold changes the next layer's input, so measure again after the first shift
_MAX_SCORES = 2_000_000


@torch.no_grad()
def calibrate_(model: nn.Module, batches: Sequence[dict[str, Any]], target: float) -> float:
    """Shift every router's bias by the same amount, so that sparsity on ``batches`` is ``target``.

    The shift is the quantile of all layers' logits together, so layers keep their different sparsities.

    Args:
        model: sparse, in mode hard; its other weights stay as they are.
        batches: inputs of the model, on its device. Take them from data it was not trained on: a model
            uses fewer experts on text that is new to it than on what it has seen.
        target: sparsity in (0, 1).

    Returns:
        The shift, in units of the logit; positive closed experts.

    Raises:
        ValueError: no batches.
    """
    if not batches:
        raise ValueError("calibrating needs at least one batch")
    layers = sparse_layers(model)
    tau = next(iter(layers.values())).tau
    total = 0.0
    was_training = model.training
    model.eval()
    for _ in range(_PASSES):
        logits: list[Tensor] = []
        with record_scores(model) as recording:
            for batch in batches:
                model(**batch)
                for name, scores in recording.scores.items():
                    mask = recording.mask(name)
                    kept = scores.flatten(0, -2) if mask is None else scores[mask.bool()]
                    stride = max(1, kept.numel() * len(batches) * len(layers) // _MAX_SCORES)
                    logits.append(kept[::stride].flatten().float().clamp(1e-6, 1 - 1e-6).logit())
        values = torch.cat(logits)
        k = min(len(values), max(1, round(target * len(values))))
        shift = values.kthvalue(k).values.item() - math.log(tau / (1 - tau))
        for layer in layers.values():
            layer.router.bias.sub_(shift / layer.router.temperature)
        total += shift
    model.train(was_training)
    return total
