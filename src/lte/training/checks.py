"""Checks before a training run: combinations of model, arguments and callbacks that cannot work."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from lte.modules.in_full import InFull
from lte.modules.recording import sparse_layers
from lte.modules.sharding import is_sharded
from lte.modules.tensor_parallel import check_not_shared
from lte.training.arguments import LTETrainingArguments


def check_dtype(dtype: torch.dtype | str) -> None:
    """Raise ValueError if the dtype is float16: small steps are lost there, and large values become inf."""
    if dtype == torch.float16:
        raise ValueError(
            "weights in float16 cannot be trained, because they become NaN: load the model in float32 (or bfloat16); "
            "fp16 and bf16 of the training arguments make training fast"
        )


def check_model(model: Any, args: LTETrainingArguments) -> None:
    """Raise ValueError unless a run with these arguments can train the model."""
    if args.n_gpu > 1:
        raise ValueError(
            f"LTETrainer does not use DataParallel, but this one process sees {args.n_gpu} GPUs: start it with "
            "torchrun --nproc_per_node N, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    if model is None:
        raise ValueError("LTETrainer needs a model, made sparse by lte.sparsify_: it does not take model_init")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "this model has adapters of peft: merge them first (merge_and_unload); with lora_rank, LTETrainer adds "
            "adapters of its own"
        )
    if any(isinstance(module, InFull) for module in model.modules()):
        raise ValueError("this model has the adapters of a run that did not end: load it again")
    sparse_layers(model)  # raises ValueError if there are none
    check_not_shared(model, "LTETrainer groups and fits")
    name = type(model).__name__
    if args.distillation_weight and name.endswith(("ForQuestionAnswering", "ForPreTraining")):
        raise ValueError(f"{name} has no logits to compare: give distillation_weight=0")
    for parameter in model.parameters():
        if parameter.requires_grad:
            check_dtype(parameter.dtype)


def check_callbacks(callbacks: Iterable[TrainerCallback], args: LTETrainingArguments) -> None:
    """Raise ValueError if a callback would end a run before its last stage."""
    if not args.is_dense and any(isinstance(one, EarlyStoppingCallback) for one in callbacks):
        raise ValueError(
            "EarlyStoppingCallback compares evaluations of all stages, and the dense one has the best: only "
            "schedule='dense' takes it"
        )


def check_sharded(trainer: Any) -> None:
    """Raise ValueError unless a run can work on a model whose parameters are divided among processes."""
    if trainer.is_deepspeed_enabled and is_deepspeed_zero3_enabled():
        raise ValueError("neurons cannot be grouped when DeepSpeed divides parameters: take FSDP2 (--fsdp)")
    if not trainer.is_fsdp_enabled or not is_sharded(trainer.plain):
        return
    for name in ("lora_rank", "loss_in_pieces"):
        if getattr(trainer.args, name):
            raise ValueError(f"{name} needs whole weights in each process: drop it, or train without FSDP")
    if trainer.training.needs_whole_model and not trainer.args.is_dense:
        raise ValueError(
            f"{trainer.method.name} sets its routers on data, which needs a model that is not sharded: take a method "
            "whose routers are trained, or train without FSDP"
        )
