"""Where an evaluated model comes from, as far as its folder says: its method, and the commands that made it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from lte.evaluation.environment import environment
from lte.evaluation.measuring import Spent
from lte.evaluation.record import SUMMARY, Made, Measured, Record, records_in
from lte.files import write_whole
from lte.surgery.conversion import conversion_of, is_sparse
from lte.surgery.method import Method, mode_of
from lte.surgery.reading import read_json

_CALIBRATED, _CALIBRATED_BY = "calibrated", "calibrated_by"
"""In a summary, what has moved the thresholds since training: as :class:`Made`, and its command as a caption."""
_FEW_ZEROS = 0.01  # a model with fewer weights that are 0 is dense: some are 0 by rounding


def evaluation_record(
    command: str,
    name: str,
    config: PretrainedConfig,
    measured: Measured,
    spent: Spent,
    device: torch.device,
    **further: Any,
) -> Record:
    """The record of an evaluation of a model that is already made.

    What training wrote is left out where another command has put a model of another method into the folder since.

    Args:
        command: a caption.
        name: the model's, as it was given.
        config: the model's, as it was saved.
        measured: on what and how.
        spent: what was measured; predictions are left out.
        device: where.
        further: values that were measured as well.
    """
    method = _method(config, spent)
    values = {name: value for name, value in asdict(spent).items() if name != "predictions"}
    saved = mode_of(config) if isinstance(conversion_of(config), Method) else spent.mode
    if spent.mode != saved:
        measured = Measured(measured.kind, measured.data, {**measured.options, "mode": spent.mode})
    return Record(
        command=command,
        model=name,
        method=method,
        measured=measured,
        environment=environment(device),
        evaluation={**values, **further},
        **training_of(name, method["method"]),
    )


def training_of(name: str, method: str) -> dict[str, Any]:
    """How a model of this method was trained, as fields of a record; none where its folder does not say."""
    path = Path(name) / SUMMARY
    if not path.is_file():
        return {}
    summary = read_json(path)
    made = summary.get("made") or []  # none in a summary of before it said so in fields
    since = [summary[_CALIBRATED]] if made and _CALIBRATED in summary else []
    try:
        (trained,) = records_in({**summary, "made": [*made, *since], "evaluation": {}})
        made_as = "dense" if trained.recipe == "dense" else trained.method.get("method")
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, it does not say how the model was trained ({error}): delete it") from None
    if made_as != method:
        return {}
    return {
        "trained_by": " && ".join(filter(None, (trained.command, summary.get(_CALIBRATED_BY)))),
        **{name: getattr(trained, name) for name in ("made", "seed", "recipe", "steps")},
    }


def keep_calibration(model: Path, folder: Path, calibrated: Made, measured: bool) -> None:
    """Where a folder says how its model was trained, let that of the calibrated one say so, and what was done since.

    Args:
        model: whose thresholds were moved.
        folder: where it is saved.
        calibrated: what moved them; what did so before it counts no more.
        measured: whether to keep what training measured, as where the model is saved in its own place.
    """
    if (model / SUMMARY).is_file():
        summary = read_json(model / SUMMARY)
        summary |= {_CALIBRATED_BY: calibrated.command, _CALIBRATED: asdict(calibrated)}
        if not measured:
            summary.pop("evaluation", None)
        write_whole(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def _method(config: PretrainedConfig, spent: Spent) -> dict[str, Any]:
    if not is_sparse(config) and spent.weight_sparsity < _FEW_ZEROS:
        return {"method": "dense"}
    made = conversion_of(config)
    return {"method": "pruned-weights"} if made is None else {"method": made.name, **made.to_dict()}
