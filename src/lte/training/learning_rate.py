"""The learning rate of a run: a Hugging Face learning rate scheduler that restarts with each stage."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import get_scheduler

from lte.surgery.stages import StagePlan


def stage_factors(
    plan: StagePlan,
    scheduler: str,
    warmup: Callable[[int], int],
    kwargs: dict[str, Any],
    dense: float = 1.0,
    restart_hard: bool = True,
) -> Callable[[int], float]:
    """Return a function from a step to its learning rate factor, which warms up and decays in each stage.

    Args:
        scheduler: the name of a Hugging Face scheduler.
        warmup: a function from the number of steps of a stage to the number of its warm-up steps.
        kwargs: of the scheduler.
        dense: the peak of the dense stage. The peak of the other stages is 1.
        restart_hard: without it, soft and hard stage share one warm-up and decay.

    Raises:
        ValueError: a scheduler that cannot restart.
    """
    if restart_hard:
        starts = {0: plan.dense, plan.dense: plan.soft, plan.dense + plan.soft: plan.hard}
    else:
        starts = {0: plan.dense, plan.dense: plan.soft + plan.hard}
    lambdas = {start: _factors(scheduler, warmup(steps), steps, kwargs) for start, steps in starts.items() if steps}

    def factor(step: int) -> float:
        start = max(start for start in lambdas if start <= step)
        return lambdas[start](step - start) * (dense if step < plan.dense else 1.0)

    return factor


def _factors(name: str, warmup_steps: int, steps: int, kwargs: dict[str, Any]) -> Callable[[int], float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, warmup_steps, steps, kwargs)
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise ValueError(f"lr_scheduler_type {name!r} cannot restart with each stage: use linear, cosine or constant")
    return scheduler.lr_lambdas[0]
