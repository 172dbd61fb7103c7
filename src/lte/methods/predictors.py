"""Trains small networks that predict which experts a token will use, on values of a dense model."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedModel

from lte.methods.choosing import ChoosingRouter
from lte.surgery.activations import Wanted, record_inputs
from lte.surgery.sites import find_sites

_BATCH = 128  # tokens of a step


def check_training(epochs: int, learning_rate: float) -> None:
    """Raise ValueError unless the options are in their range."""
    if epochs < 1:
        raise ValueError(f"fit_epochs is {epochs}, but at least 1 is needed (usual: 10)")
    if learning_rate <= 0:
        raise ValueError(f"fit_learning_rate is {learning_rate}, but it must be above 0 (usual: 0.01)")


def train_predictors_(
    model: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    tokens: int,
    target_of: Callable[[Tensor, int], Tensor],
    epochs: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train every router of ``model`` (mode dense) to predict its targets from the FFN's input, by cross entropy.

    Inputs ``[tokens, D]`` of each layer are kept in bf16 on the CPU, and targets too.

    Args:
        model: with routers whose values are logits.
        tokens: number of tokens to train on.
        target_of: neurons ``[T, F]`` and the number of experts -> targets ``[T, E]``. They are booleans or not
            negative; the latter are divided by the layer's largest target.
        epochs, learning_rate: of AdamW, with 128 tokens in a step and a linear decay to 0.
        seed: of the order of tokens.

    Raises:
        ValueError: a router diverged.
    """
    sites = find_sites(model, model.config.model_type)
    wanted: list[Wanted] = []
    for site in sites:
        experts = site.installed.router.num_experts
        wanted.append((site.name, site.first, Tensor.bfloat16))
        wanted.append((site.name, site.down, lambda hidden_TF, experts=experts: target_of(hidden_TF, experts)))
    recorded = record_inputs(model, wanted, batches, tokens)
    for index, site in enumerate(sites):
        generator = torch.Generator().manual_seed(seed + index)
        x_TD, target_TE = recorded[2 * index], recorded[2 * index + 1]
        router = cast(ChoosingRouter, site.installed.router)
        _train_(router, x_TD, target_TE, epochs, learning_rate, generator)
        if not all(parameter.isfinite().all() for parameter in router.parameters()):
            raise ValueError(
                f"the predictor of {site.name} has become NaN or infinite: give a lower fit_learning_rate than "
                f"{learning_rate:g}"
            )


@torch.enable_grad()
def _train_(
    router: ChoosingRouter,
    x_TD: Tensor,
    target_TE: Tensor,
    epochs: int,
    learning_rate: float,
    generator: torch.Generator,
) -> None:
    parameters = list(router.parameters())
    dtype, device = parameters[0].dtype, parameters[0].device
    router.float()
    x_TD, target_TE = x_TD.to(device), target_TE.to(device)
    scale = 1.0 if target_TE.dtype == torch.bool else 1 / target_TE.max().clamp(min=1e-12)
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.01)
    steps = epochs * -(-len(x_TD) // _BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x_TD), generator=generator).to(device).split(_BATCH):
            loss = binary_cross_entropy_with_logits(router.values(x_TD[rows]), target_TE[rows].float() * scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    router.to(dtype)
