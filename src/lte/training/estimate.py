"""What a run will do and need, before its first step: stages, parameters, memory, and time if some steps are timed."""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import DefaultFlowCallback

from lte.modules.recording import sparse_layers
from lte.surgery.convert import set_mode_
from lte.surgery.method import mode_of
from lte.surgery.stages import StagePlan
from lte.training.stages import CALIBRATIONS
from lte.training.step_clock import StepClock

_STATES = {"adamw_torch": 8.0, "adamw_torch_fused": 8.0, "adamw_torch_8bit": 2 + 8 / 256, "adamw_torch_4bit": 1.0625}
_STATES |= {"sgd": 0.0}
"""Bytes of an optimizer's state for a number that is trained in fp32."""
_TIMED = 4  # steps of each stage; the first does not count
_PIECE = 2048  # rows of a loss that are computed at a time
_COPIES = 5  # fp32 copies of a piece of logits that exist at a time


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Attributes:
        stages: their steps.
        experts: of a layer.
        layers: with experts.
        parameters: of each group, the number of parameters and their bytes.
        memory: bytes at the peak of a soft step (of a dense one in a dense run), by what holds them. It leaves out what
            libraries keep for themselves.
        unknown: the optimizer, if the bytes of its states are not known and left out.
    """

    stages: StagePlan
    experts: int
    layers: int
    parameters: dict[str, tuple[int, int]]
    memory: dict[str, int]
    unknown: str | None

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Times:
    """Seconds of a run, from a few steps of each stage.

    Attributes:
        step: the median of a step, by stage.
        begin: the start of all stages: grouping, fitting, calibration.
        total: of all steps and starts, without evaluations and saves.
        peak: bytes that were allocated on a GPU; None on a CPU.
    """

    step: dict[str, float]
    begin: float
    total: float
    peak: int | None


def steps_of(trainer: Any) -> int:
    """Return the number of optimizer steps of a run."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    an_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    return math.ceil(max(1, an_epoch) * args.num_train_epochs)


def estimate(trainer: Any) -> Estimate:
    """Return what a run of this ``LTETrainer`` needs. One row of the training data passes through the model."""
    model, args, total = trainer.plain, trainer.args, steps_of(trainer)
    stages = StagePlan(total, 0, 0) if args.is_dense else trainer.training.plan(total)
    groups = _groups(trainer)
    layers = [*sparse_layers(model).values()]
    parameters = {
        name: (sum(one.numel() for one in held), sum(one.nbytes for one in held)) for name, held in groups.items()
    }
    trained = [one for name, held in groups.items() if name != "frozen" for one in held]
    optimizer = str(getattr(args.optim, "value", args.optim))
    states = _STATES.get(optimizer, 0.0)
    weights = sum(size for _, size in parameters.values())
    teacher = 0
    if args.distils and trainer.adapters is None:
        teacher = sum(2 * one.numel() if args.bf16 else one.nbytes for one in model.parameters())
    activations, logits = _activations(trainer)
    memory = {
        "weights": weights,
        "gradients": sum(one.nbytes for one in trained),
        "optimizer": round(sum(states * one.nbytes / 4 for one in trained)),
        "teacher": teacher,
        "activations": activations,
        "logits": logits,
    }
    unknown = None if optimizer in _STATES else optimizer
    return Estimate(stages, layers[0].router.num_experts, len(layers), parameters, memory, unknown)


def time_steps(trainer: Any, plan: StagePlan) -> Times:
    """Run a few steps of each stage of a run and return their times. The model is trained by them."""
    args = trainer.args
    stages = {name: steps for name, steps in vars(plan).items() if steps}
    args.max_steps = _TIMED * len(stages)
    if not args.is_dense:
        shares = [_TIMED / args.max_steps if name in stages else 0.0 for name in ("dense", "hard")]
        args.dense_fraction, args.hard_fraction = shares
    args.eval_strategy = args.save_strategy = "no"
    args.load_best_model_at_end, args.logging_steps = False, 10**9
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = StepClock(args.device)
    trainer.callback_handler.callbacks = [DefaultFlowCallback(), trainer.stages, clock]
    trainer.stages.enter = clock.timed(trainer.stages.enter)
    once = _Once(trainer.stages.calibrate)  # a short stage would calibrate at every step
    trainer.stages.calibrate = once
    with tempfile.TemporaryDirectory() as args.output_dir:
        trainer.train()
    seconds = [math.nan, *clock.seconds()]
    step = {
        name: statistics.median(seconds[_TIMED * index + 1 : _TIMED * (index + 1)]) for index, name in enumerate(stages)
    }
    total = clock.begin + sum(stages[name] * one for name, one in step.items())
    total += once.seconds * min(CALIBRATIONS, stages.get("hard", 0))
    peak = torch.cuda.max_memory_allocated() if args.device.type == "cuda" else None
    return Times(step, clock.begin, total, peak)


class _Once:
    """Calls a function the first time only and takes its seconds."""

    def __init__(self, function: Callable[[], None]):
        self._function, self.seconds = function, 0.0

    def __call__(self) -> None:
        if not self.seconds:
            start = time.perf_counter()
            self._function()
            self.seconds = time.perf_counter() - start


def _groups(trainer: Any) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of the model by what they are, and whether they are trained."""
    model, optimizer = trainer.plain, trainer.create_optimizer()
    trained = {id(one) for group in optimizer.param_groups for one in group["params"] if one.requires_grad}
    layers = sparse_layers(model).values()
    kinds = {id(one): "routers" for layer in layers for one in layer.router.parameters()}
    for layer in layers:
        if layer.compensation is not None:
            kinds |= {id(one): "compensation" for one in layer.compensation.parameters()}
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kind = "adapters" if ".lora_" in name else "norms and heads" if ".trained." in name else "weights"
        kind = kinds.get(id(parameter), kind) if id(parameter) in trained else "frozen"
        found.setdefault(kind, []).append(parameter)
    return found


def _activations(trainer: Any) -> tuple[int, int]:
    """Return the bytes that the backward pass of a micro-batch needs, and those of logits and loss."""
    args, model, data = trainer.args, trainer.plain, trainer.train_dataset
    row = data[0] if hasattr(data, "__getitem__") else next(iter(data))
    batch = trainer._get_collator_with_removed_columns(trainer.data_collator)([row])
    inputs = trainer._read_by_model(trainer._prepare_inputs(batch))
    size, tokens = args.per_device_train_batch_size, next(iter(inputs.values())).shape[:2].numel()
    mode = mode_of(model.config)
    set_mode_(model, "dense" if args.is_dense else "soft")
    try:
        with trainer.accelerator.autocast():
            saved = _saved_bytes(model, inputs, 1, args.recomputes)
            if size > 1:  # what does not depend on the rows counts once, such as casts of weights
                saved += (size - 1) * (_saved_bytes(model, inputs, 2, args.recomputes) - saved)
    finally:
        set_mode_(model, mode)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
    head = model.get_output_embeddings()
    if head is None or not vocabulary:
        return saved, 0
    if args.loss_in_pieces:
        return saved, 4 * _COPIES * 2**26
    itemsize = 2 if args.bf16 or args.fp16 else head.weight.itemsize
    if not args.distils:
        return saved, size * tokens * vocabulary * (2 * itemsize + 3 * 4)  # the loss is computed in fp32 at once
    pieces = 4 * _COPIES * min(size * tokens, _PIECE) * vocabulary
    return saved, size * tokens * vocabulary * 3 * itemsize + pieces  # of student and teacher, and a gradient


def _saved_bytes(model: Any, inputs: dict[str, Tensor], rows: int, checkpointing: bool) -> int:
    """Run a row several times at once and return the bytes that are kept for its backward pass."""
    weights = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # it keeps them, so that no address is used twice
    blocks: list[list[int]] = []  # the bytes before a block, after it, and of its input

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept.setdefault(address, tensor)
        return tensor

    def total() -> int:
        return sum(one.untyped_storage().nbytes() for one in kept.values())

    def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        blocks.append([total(), 0, given.nbytes])

    def after(*_: Any) -> None:
        blocks[-1][1] = total()

    was_training = model.training
    model.train()
    with ExitStack() as hooks:
        hooks.callback(model.train, was_training)
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(**{name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in inputs.items()})
        found = total()
        del outputs
    if checkpointing and blocks:  # a block's own are computed again when its turn comes
        own = [end - start for start, end, _ in blocks]
        found += sum(given for _, _, given in blocks) + max(own) - sum(own)
    return found
