"""Calibration: one shift of all routers' thresholds, measured on data, gives fixed routers the target sparsity."""

import logging
import math
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lte.core.sampling import stride_for
from lte.methods.choosing import count_tokens
from lte.methods.cuts import set_cuts_, sizes_of_inputs
from lte.modules.evaluating import evaluating
from lte.modules.input_threshold import CUT, cut_layers
from lte.modules.recording import check_hard, check_lte_routers, record_scores, sparse_layers
from lte.surgery.conversion import section_of

logger = logging.getLogger(__name__)

_MAX_LOGITS = 2_000_000
_MISSED = 0.01


@torch.no_grad()
def calibrate_(model: nn.Module, batches: Iterable[dict[str, Any]], target_sparsity: float, passes: int = 2) -> float:
    """Shift every router's bias by the same amount, so that sparsity on ``batches`` is ``target_sparsity``.

    This changes the sparsity of a trained model without training. The shift is the quantile of all layers' logits
    together, so layers keep their different sparsities. A model with ``attention_sparsity`` also gets new thresholds on
    the inputs of attention's projections. Nothing else of the model changes, and an optimised model (``lte.optimize_``)
    stays optimised.

    Args:
        model: sparse, in mode hard.
        batches: inputs of the model, read ``passes`` times, and twice that with ``attention_sparsity``. Take them from
            data that the model was not trained on: a model uses fewer experts on new text. Padding does not count.
        target_sparsity: in (0, 1).
        passes: number of forward passes over the batches. A shift of one layer changes the next layer's input, so one
            pass is not enough.

    Returns:
        The shift, in units of the logit. A positive shift closes experts.

    Raises:
        ValueError: there is no batch, the target is outside (0, 1), the model is dense or in another mode, or its
            routers give NaN. Then the model does not change.
    """
    batches = list(batches)
    if not batches or passes < 1:
        raise ValueError("calibration needs at least one batch and at least one pass")
    check_calibration(model, target_sparsity)
    layers = sparse_layers(model)
    before = {name: layer.lte_router.bias.clone() for name, layer in layers.items()}
    cuts = [linear.get_buffer(CUT) for linear in cut_layers(model).values()]
    cuts_before = [cut.clone() for cut in cuts]
    total, sparsity = 0.0, math.nan
    try:
        with evaluating(model):
            for _ in range(passes):
                set_attention_cuts_(model, batches)
                cut, sparsity = _cut(_margins(model, batches), target_sparsity)
                total += cut
                for name, layer in layers.items():  # from the original biases: shifts are added before they are rounded
                    layer.lte_router.bias.copy_(before[name].float() - total / layer.lte_router.temperature)
    except BaseException:
        for name, layer in layers.items():
            layer.lte_router.bias.copy_(before[name])
        for cut, old in zip(cuts, cuts_before, strict=True):
            cut.copy_(old)
        raise
    if abs(sparsity - target_sparsity) > _MISSED:
        logger.warning(
            "sparsity %.3f is as near to %.3f as one shift allows: many router logits are equal, or the batches hold "
            "few tokens",
            sparsity,
            target_sparsity,
        )
    if section := section_of(getattr(model, "config", None)):
        section["target_sparsity"] = target_sparsity
    return total


def set_attention_cuts_(model: Any, batches: list[dict[str, Any]]) -> None:
    """Set the thresholds on the inputs of attention's projections by the quantiles of their sizes on ``batches``.

    Layers are set one after the other, behind layers that are sparse already. Do nothing if the model has no such
    thresholds.

    Raises:
        ValueError: there is no batch, or only padding.
    """
    if linears := cut_layers(model):
        tokens, share = count_tokens(batches), section_of(model.config)["attention_sparsity"]
        with evaluating(model):
            set_cuts_(model, sizes_of_inputs(linears, tokens), [share] * len(linears), batches, tokens)


def check_calibration(model: nn.Module, target_sparsity: float) -> None:
    """Raise ValueError unless thresholds of the model can be calibrated.

    The target must be in (0, 1), and the model must be LTE's, in mode hard.
    """
    check_calibration_target(target_sparsity)
    layers = sparse_layers(model).values()
    check_lte_routers(layers, "convert (or train) the dense model again with another target_sparsity")
    check_hard(layers, "but thresholds are those of mode hard")
    if not all(0 < layer.tau < 1 for layer in layers):
        raise ValueError("tau is not between 0 and 1 in every layer: no shift of the router's bias reaches it")


def check_calibration_target(target_sparsity: float) -> None:
    """Raise ValueError unless the target is in (0, 1), so that thresholds can meet it."""
    if not 0 < target_sparsity < 1:
        raise ValueError(
            f"target_sparsity is {target_sparsity}, but it must lie between 0 and 1, e.g. 0.5 "
            '(for 0 use mode dense: lte.set_mode_(model, "dense"))'
        )


def _margins(model: nn.Module, batches: list[dict[str, Any]]) -> Tensor:
    """Return logits minus the logit of tau, for the tokens of all layers without padding, or a sample of them.

    The sample has some experts of every token, in turn. Tokens differ much (the first of a text uses nearly all
    experts), so a sample of tokens would be less exact. Logits are kept, not scores, because a sigmoid is 1 from a
    logit of 17 on.
    """
    layers = sparse_layers(model)
    device = next(model.parameters()).device
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    kept: list[Tensor] = []
    stride = 0
    with ExitStack() as hooks, record_scores(model) as recording:  # a recording makes optimised layers call the router
        for name, layer in layers.items():
            hook = partial(_keep_logits, seen[name], math.log(layer.tau / (1 - layer.tau)))
            hooks.callback(layer.router.register_forward_hook(hook).remove)
        for batch in batches:
            model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
            if stride == 0:
                logits = sum(one.numel() for parts in seen.values() for one in parts)
                widths = [layer.router.num_experts for layer in layers.values()]
                stride = stride_for(logits * len(batches), _MAX_LOGITS, *widths)
            for name, parts in seen.items():
                if not parts:  # the layer did not run in this pass
                    continue
                margins_TE = torch.cat(
                    parts, dim=-2
                )  # several parts if the model runs its FFN in chunks of the sequence
                mask = recording.mask(name)
                real_TE = margins_TE.flatten(0, -2) if mask is None else margins_TE[mask.to(margins_TE.device).bool()]
                kept.append(real_TE.flatten()[::stride].clone().to(device))
                parts.clear()
    if not any(len(values) for values in kept):
        raise ValueError("the batches hold only padding, so there is no token for calibration")
    return torch.cat(kept)


def _keep_logits(parts: list[Tensor], threshold: float, router: Any, args: tuple[Tensor, ...], _scores: Tensor) -> None:
    parts.append(router.logits(args[0]) - threshold)


def _cut(values: Tensor, share: float) -> tuple[float, float]:
    """Return a number with about ``share`` of the values below it and none equal to it, and the real share.

    Equal values are on the same side, the one that comes nearer to ``share``.
    """
    if not values.isfinite().all():
        raise ValueError("router logits are not finite: the model is damaged, or its training went wrong")
    value = values.kthvalue(min(len(values), max(1, round(share * len(values))))).values
    below, above = values[values < value], values[values > value]
    without, including = len(below) / len(values), 1 - len(above) / len(values)
    if abs(including - share) <= abs(without - share):
        return _between(value, above.min() if len(above) else value + 1), including
    return _between(below.max() if len(below) else value - 1, value), without


def _between(low: Tensor, high: Tensor) -> float:
    return (low + (high - low) / 2).item()
