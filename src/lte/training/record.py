"""The record of a training run: its options as fields, and the result of its evaluation."""

import os
from collections.abc import Sequence
from copy import copy
from dataclasses import MISSING, asdict, fields
from typing import Any

import torch
from transformers.trainer_pt_utils import AcceleratorConfig

from lte.data.sources import Source
from lte.evaluation.environment import environment
from lte.evaluation.evaluate import Evaluation
from lte.evaluation.inputs import Inputs
from lte.evaluation.record import Made, Measured, Record, given, plain
from lte.surgery.method import Method
from lte.training.arguments import LTETrainingArguments
from lte.training.identity import MAY_CHANGE, options_of

_GOAL = ("schedule", "recipe", "target_sparsity", "eta")
"""Options that have no common default for every run."""
_USUAL = {"method": "lte", "calibration_text": [], "held_out": 0.0, "dtype": "auto"}
_SAME = {"dtype": "float32"}
"""Other names of usual values."""
_SAME_RUN = MAY_CHANGE | {"seed"}


def made_by_training(
    command: str, model: str, method: Method, inputs: Inputs, args: LTETrainingArguments, **others: Any
) -> Made:
    """Return the work of a run of :func:`lte.train`. ``others`` are its arguments that are in :data:`_USUAL`."""
    others |= {"method": method.name, "dtype": str(others["dtype"]).removeprefix("torch.")}
    others["method_seed"] = method.to_dict().get("seed", args.seed)  # some methods have no seed
    usual = {**_USUAL, "method_seed": args.seed}
    ours = {name: value for name, value in plain(others).items() if value not in (usual[name], _SAME.get(name))}
    return Made(command, model, names_of(inputs.text), {**ours, **given(inputs), **given(method), **given_of(args)})


def measured_in_training(inputs: Inputs, eval_data: Sequence[Source]) -> Measured:
    """Return the data of a run's last evaluation."""
    if eval_data:
        return Measured("data", names_of(eval_data), given(inputs))
    return Measured("held out", names_of(inputs.text), given(inputs))


def run_record(made: Made, measured: Measured, trainer: Any, device: torch.device, evaluation: Evaluation) -> Record:
    """Return the record of a finished run. ``trainer`` is its ``LTETrainer``."""
    return Record(
        command=made.command,
        model=made.model,
        made=(made,),
        measured=measured,
        environment=environment(device),
        seed=trainer.args.seed,
        recipe=options_of(trainer.args)["recipe"],
        method=trainer.method.to_dict(),
        target_sparsity=trainer.training.target,
        eta=trainer.training.state().get("eta", 0.0),
        steps=asdict(trainer.stages.plan),
        evaluation=asdict(evaluation),
    )


def given_of(args: LTETrainingArguments) -> dict[str, Any]:
    """Return the options that change the result and differ from the schedule's or library's values, without seed."""
    usual: Any = copy(args)
    for one in fields(args):
        if one.init and one.name not in _GOAL:
            setattr(usual, one.name, one.default if one.default_factory is MISSING else one.default_factory())
    usual.accelerator_config = AcceleratorConfig()
    usual.fill_in()
    found, default = options_of(args), options_of(usual)
    goal = {name: found[name] for name in _GOAL if found.get(name) not in (None, "default")}
    changed = {name: value for name, value in found.items() if value != default.get(name)}
    return {**goal, **{name: value for name, value in changed.items() if name.partition(".")[0] not in _SAME_RUN}}


def names_of(sources: Sequence[Source]) -> tuple[str, ...]:
    return tuple(os.fspath(source) for source in sources)
