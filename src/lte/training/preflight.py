"""Tries before the first step what a run does later: evaluate, calibrate, save. Checks the room on the disk."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import ExportableState

from lte.files import new_path, writing
from lte.modules.evaluating import evaluating
from lte.surgery.generation_settings import keep_generation_settings_
from lte.training.divergence import weights_not_finite
from lte.training.saving_trainer import PROVEN

_ALWAYS = ("runtime", "samples_per_second", "steps_per_second", "epoch")  # metrics that Trainer.evaluate adds
_ADAMS = ("adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adamw_anyprecision")
_SPACES = "give save_total_limit, a larger save_steps or save_only_model, or another output_dir"


def try_out(trainer: Any, teacher: bool) -> None:
    """Try on one batch, and without weights, all that a run does after its first steps. The random state is kept.

    Args:
        trainer: an ``LTETrainer`` whose training begins.
        teacher: whether the run will keep a dense model on disk.

    Raises:
        ValueError: weights are not finite, files cannot be written, the disk has too little space, the data cannot be
            used for evaluation or calibration, or ``metric_for_best_model`` is unknown.
        NotWritten: the output folder cannot be written to.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if broken := weights_not_finite(model):
        raise ValueError(f"{len(broken)} weights hold NaN or infinities before any training, first {broken[0]}")
    keep_generation_settings_(model)
    _try_saving(trainer)
    if trainer.args.should_save:
        check_space(Path(trainer.args.output_dir), _wanted(trainer, model, teacher))
    with torch.random.fork_rng([trainer.args.device] if trainer.args.device.type == "cuda" else []), _unseen(trainer):
        _try_evaluation(trainer)
        _try_calibration(trainer, model)


def check_space(folder: Path, parts: Mapping[str, int]) -> None:
    """Raise ValueError if the disk of ``folder`` has less room than a run needs.

    Args:
        parts: the files that the run writes, by name, with their bytes.
    """
    free, wanted = shutil.disk_usage(folder).free, sum(parts.values())
    if wanted > free:
        listed = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size)
        raise ValueError(
            f"{folder} has {_gb(free)} free, but the run will write {_gb(wanted)} ({listed}): make room, or {_SPACES}"
        )


def _gb(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def _try_saving(trainer: Any) -> None:
    """Save everything except weights to a folder in the output folder, then delete it."""
    if not trainer.args.should_save:
        trainer._save("", state_dict={})  # all ranks gather a model that was sharded at loading
        return
    folder = Path(trainer.args.output_dir)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with new_path(folder) as fresh:
            trainer._save(str(fresh), state_dict={})
            if trainer.args.save_strategy != "no":
                _try_checkpoint(trainer, str(fresh))


def _try_checkpoint(trainer: Any, folder: str) -> None:
    for one in trainer.callback_handler.callbacks:
        if isinstance(one, ExportableState):
            try:
                json.dumps(one.state())
            except TypeError as error:
                raise ValueError(f"the state of callback {type(one).__name__} cannot be saved: {error}") from error
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not trainer.args.save_only_model and not sharded and not trainer.state.global_step:
        trainer._save_optimizer_and_scheduler(folder)  # still empty


def _wanted(trainer: Any, model: nn.Module, teacher: bool) -> dict[str, int]:
    """Return the least number of bytes that a run will write, by kind of file."""
    args, state = trainer.args, trainer.state
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    trained = sum(one.numel() * one.element_size() for one in model.parameters() if one.requires_grad)
    states = 0 if args.save_only_model or args.optim not in _ADAMS else 2 * trained
    there = len(list(Path(args.output_dir).glob("checkpoint-*")))
    left = state.max_steps - state.global_step
    if args.save_strategy == "steps":
        saves = math.ceil(left / max(1, state.save_steps))
    elif args.save_strategy == "epoch":
        saves = math.ceil(left / max(1, math.ceil(state.max_steps / max(1, state.num_train_epochs))))
    else:
        saves = int(args.save_strategy == "best")
    if args.save_total_limit:
        most = max(args.save_total_limit, PROVEN) + 1  # the oldest is deleted after the newest is written
        saves = min(saves, max(0, most - there))
    return {
        "the model": trained if args.save_adapter else weights,
        f"{saves} checkpoints": saves * ((trained if args.lora_rank else weights) + states),
        "the dense model to learn from": weights if teacher else 0,
    }


@contextmanager
def _unseen(trainer: Any) -> Iterator[None]:
    """Hide what happens inside the context from callbacks, such as progress bars and loggers."""
    callbacks, trainer.callback_handler.callbacks = trainer.callback_handler.callbacks, []
    try:
        yield
    finally:
        trainer.callback_handler.callbacks = callbacks


def _try_evaluation(trainer: Any) -> None:
    """Evaluate the first batch of each data set, if there will be evaluations."""
    args = trainer.args
    if args.eval_strategy == "no" or trainer.eval_dataset is None:
        return
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    known: set[str] = set()
    for name, dataset in sets.items():
        prefix = f"eval_{name}" if name else "eval"
        loader = trainer.get_eval_dataloader(_first_rows(dataset, args.eval_batch_size * args.world_size))
        only_loss = True if trainer.compute_metrics is None else None
        output = trainer.evaluation_loop(loader, "Evaluation", only_loss, metric_key_prefix=prefix)
        if not output.num_samples:
            raise ValueError(f"eval_dataset {name} has no row: give one".replace("  ", " "))
        for metric, value in output.metrics.items():
            if metric.endswith("_loss") and not math.isfinite(value):
                raise ValueError(
                    f"{metric} is {value} on the first batch, before any step: check that its rows have labels, and "
                    "that the model's dtype can hold its outputs"
                )
        known |= {*output.metrics, *(f"{prefix}_{one}" for one in _ALWAYS)}
    wanted = args.metric_for_best_model
    if wanted is not None and f"eval_{wanted.removeprefix('eval_')}" not in known:
        names = ", ".join(sorted(one.removeprefix("eval_") for one in known))
        raise ValueError(f"metric_for_best_model is {wanted!r}, but evaluation gives {names}")


def _first_rows(dataset: Any, count: int) -> Any:
    if hasattr(dataset, "select"):  # of the library datasets: Trainer looks at its columns
        return dataset.select(range(min(count, len(dataset))))
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return [dataset[index] for index in range(min(count, len(dataset)))]
    return list(islice(dataset, count))


@torch.no_grad()
def _try_calibration(trainer: Any, model: nn.Module) -> None:
    """Run the first batch of the rows for thresholds, if there will be a calibration."""
    if trainer.rows.held_out is None or trainer.training.target is None:
        return
    batch = next(trainer.rows.held_out(), None)
    if batch is None:
        raise ValueError("calibration_dataset has no row: give one, or leave it out to keep training rows out for it")
    with evaluating(model), trainer.accelerator.autocast():
        model(**batch)
