"""What a training run refuses: before it begins things that are fine each on its own, later what diverged."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback

from lte.surgery.method import Method
from lte.training.arguments import LTETrainingArguments
from lte.training.stages import StagePlan


def check_method(method: Method, args: LTETrainingArguments) -> None:
    """Whether a method other than LTE fits the arguments.

    Raises:
        ValueError: it does not.
    """
    if args.recipe == "paper":
        raise ValueError(f"recipe='paper' trains LTE's routers, not those of {method.name}: take the default recipe")
    made_for = getattr(method, "target_sparsity", None)
    if args.target_sparsity is not None and args.target_sparsity != made_for:
        raise ValueError(
            f"the model was made for target_sparsity {made_for}, but the arguments ask for {args.target_sparsity}: "
            "make them one, or convert the dense model again"
        )


def check_dtype(dtype: torch.dtype | str) -> None:
    """Raise ValueError unless weights of this dtype can be trained: small steps are lost in float16, large ones inf."""
    if dtype == torch.float16:
        raise ValueError(
            "weights in float16 cannot be trained, they soon are NaN: load the model in float32 (or bfloat16); fp16 "
            "and bf16 of the training arguments make it fast"
        )


def check_head(model: Any, args: LTETrainingArguments) -> None:
    """Whether the model's outputs can be compared with those of a teacher.

    Raises:
        ValueError: they cannot.
    """
    name = type(model).__name__
    if args.distillation_weight and name.endswith(("ForQuestionAnswering", "ForPreTraining")):
        raise ValueError(f"{name} has no logits to compare: give distillation_weight=0")


def check_callbacks(callbacks: Iterable[TrainerCallback], args: LTETrainingArguments) -> None:
    """Whether none of them would end a run before its last stage.

    Raises:
        ValueError: one would.
    """
    if args.recipe != "dense" and any(isinstance(one, EarlyStoppingCallback) for one in callbacks):
        raise ValueError(
            "EarlyStoppingCallback compares evaluations of all stages, and the dense one has the best: only "
            "recipe='dense' takes it"
        )


def check_converged(what: str, values: Iterable[Tensor]) -> None:
    """Whether training before went well.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not all(one.isfinite().all() for one in values):
        raise ValueError(f"{what} has become NaN or infinite, training diverged: give a lower learning rate")


def check_sharded(plan: StagePlan, method: Method, args: LTETrainingArguments, grouped: bool) -> None:
    """Whether a run can do without looking at whole weights, which no rank has when parameters are sharded.

    Args:
        grouped: whether the model's neurons are in experts already.

    Raises:
        ValueError: it cannot.
    """
    if plan.dense == plan.total:
        return
    if plan.dense:
        raise ValueError(
            "the dense stage cannot be followed by regrouping when parameters are sharded: "
            "fine-tune first, then lte.sparsify_, then train with dense_fraction=0"
        )
    if not grouped:
        raise ValueError(
            "neurons cannot be grouped when parameters are sharded: leave grouped=False out of lte.sparsify_"
        )
    if args.router_start == "fitted" or not method.learns:
        raise ValueError("routers cannot be fitted when parameters are sharded: give router_start='random'")
    if args.distillation_weight or args.feature_distillation_weight:
        raise ValueError(
            "the dense model cannot be copied, to learn from it, when parameters are sharded: give "
            "distillation_weight=0 and feature_distillation_weight=0"
        )
