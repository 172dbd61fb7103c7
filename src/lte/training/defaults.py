"""The values of a run that its model and data decide if they are not given: the number of steps, and learning rates.

The constants come from runs of SmolLM2-135M on WikiText-2. docs/method.md says where else they were tried.
"""

import logging
import math
from collections.abc import Iterable
from itertools import islice
from statistics import fmean, median
from typing import Any, cast

import torch
from torch import Tensor

from lte.surgery.activations import watch_inputs
from lte.surgery.sites import find_sites
from lte.training.arguments import LTETrainingArguments
from lte.training.resuming import agreed

logger = logging.getLogger(__name__)

STEPS, EPOCHS = 1200, 10
TOKENS = 16 * 1024
"""The tokens with a loss in each step of the runs that gave the constants."""
ADAPTERS = 10
"""The learning rate of adapters over that of what trains in full."""
_EPOCHS_OF_TRAINER = 3.0  # without effect, because max_steps is set
_OF_WEIGHTS = 3.1e-3  # the learning rate over the root mean square of the FFN weights
_DENSE = 0.5  # the learning rate of the dense stage over that of the other stages
_OF_LOGITS = 0.56  # the most that a step of Adam changes a router's logit
_USUAL = 1e-2  # the rate of routers without data, or without training
_BATCHES = 8  # to count the tokens with a loss
_ROWS, _READ = 2, 2048  # of a batch, and tokens in all, to measure the inputs of FFNs


def settle_steps(args: LTETrainingArguments, dataset: Any) -> None:
    """Set ``max_steps`` if neither steps nor epochs are given: 1200 steps, but at most 10 epochs."""
    if args.num_train_epochs is not None:
        return
    args.num_train_epochs = _EPOCHS_OF_TRAINER
    if args.max_steps <= 0:
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        most = EPOCHS * max(1, math.ceil(len(dataset) / rows)) if hasattr(dataset, "__len__") else STEPS
        args.max_steps = min(STEPS, most)


def settle_rates(args: LTETrainingArguments, model: Any, batches: Iterable[dict[str, Any]]) -> None:
    """Set the learning rates that are None. The first process decides for all processes.

    A step of Adam changes a weight by about the learning rate. So the rate is proportional to the root mean square of
    the FFN weights, as in Adafactor (Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235). With fewer tokens in a
    step than :data:`TOKENS`, it shrinks with the square root of their number (Malladi et al., 2022,
    https://arxiv.org/abs/2205.10287). A router's logit changes by at most the rate times the sum of the absolute values
    of its input. So the rate of routers is inversely proportional to this sum. Adapters have ten times the rate of
    weights (Schulman et al., 2025, LoRA Without Regret, https://thinkingmachines.ai/blog/lora).

    Args:
        model: with sparse FFNs and whole weights.
        batches: training batches, with labels. Empty without data.
    """
    weights, routers = args.learning_rate is None, args.router_learning_rate is None
    if routers and args.is_dense:  # it trains none
        args.router_learning_rate, routers = _USUAL, False
    if not weights and not routers:
        return

    def measure() -> tuple[float, float]:
        seen = list(islice(batches, _BATCHES))
        tokens = _tokens_in(seen) * args.gradient_accumulation_steps * args.world_size
        rate = rate_of_weights(model, tokens) * (ADAPTERS if args.lora_rank else 1) if weights else 0.0
        return rate, rate_of_routers(model, seen) if routers else 0.0

    rate, router_rate = agreed(args.process_index == 0, measure)
    if weights:
        args.learning_rate = _rounded(rate)
        args.dense_learning_rate = args.dense_learning_rate or _rounded(_DENSE * rate)
        logger.info("learning rate %g, and %g in the dense stage", rate, args.dense_learning_rate)
    if routers:
        args.router_learning_rate = router_rate
        logger.info("learning rate of the routers %g", router_rate)


@torch.no_grad()
def rate_of_weights(model: Any, tokens: float = TOKENS) -> float:
    """Return the learning rate of a model for steps of this number of tokens with a loss; 0 means not known."""
    sites = find_sites(model, model.config.model_type)
    matrices = [cast(Tensor, one.weight) for site in sites for one in site.projections().values()]
    size = fmean(float(one.float().square().mean().sqrt()) for one in matrices)
    return _rounded(_OF_WEIGHTS * size * math.sqrt(min(1.0, (tokens or TOKENS) / TOKENS)))


def rate_of_routers(model: Any, batches: list[dict[str, Any]]) -> float:
    """Return the learning rate of routers, from the inputs of FFNs on these batches."""
    if not batches:
        return _USUAL
    modules = [(site.name, site.first) for site in find_sites(model, model.config.model_type)]
    sums: list[list[Tensor]] = [[] for _ in modules]

    def see(index: int, x_TD: Tensor) -> None:
        sums[index].append(x_TD.float().abs().sum(-1))

    decodes = getattr(model.config, "is_encoder_decoder", False)  # such a model reads the labels
    rows = ({name: value[:_ROWS] for name, value in batch.items() if decodes or name != "labels"} for batch in batches)
    watch_inputs(model, modules, rows, see, _READ)
    return _rounded(_OF_LOGITS / max(1e-6, median(float(torch.cat(one).mean()) for one in sums)))


def _tokens_in(batches: list[dict[str, Any]]) -> float:
    """Return the mean number of tokens with a loss in a batch. A label of a whole row counts as all its tokens."""
    return fmean(map(_count, batches)) if batches else 0.0


def _count(batch: dict[str, Any]) -> int:
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        return int(labels.ne(-100).sum())
    return next(iter(batch.values())).shape[:2].numel() if mask is None else int(mask.sum())


def _rounded(rate: float) -> float:
    """Return two digits, so that a resumed run finds the same value on another device."""
    return float(f"{rate:.2g}")
