"""The origin of an evaluated model, as its folder says it: its method, and the commands that made it."""

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
"""Keys of a summary for the calibration since training: as :class:`Made`, and its command as a caption."""
_FEW_ZEROS = 0.01  # a model with a smaller share of zeros is dense: some weights are 0 by rounding


def evaluation_record(
    command: str,
    name: str,
    config: PretrainedConfig,
    measured: Measured,
    spent: Spent,
    device: torch.device,
    **further: Any,
) -> Record:
    """Return the record of an evaluation of an existing model.

    The fields of training are left out if another command has saved a model of another method in the folder since.

    Args:
        command: a caption.
        name: the name of the model, as it was given.
        config: of the model, as it was saved.
        measured: the data and options of the measurement.
        spent: the measured values; predictions are left out.
        device: of the measurement.
        further: other measured values.
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
    """Return how a model of this method was trained, as fields of a record; {} if its folder does not say it."""
    path = Path(name) / SUMMARY
    if not path.is_file():
        return {}
    summary = read_json(path)
    made = summary.get("made") or []  # an old summary has no such fields
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
    """Copy the summary of training, if there is one, to the folder of the calibrated model, and add the calibration.

    Args:
        model: the folder of the model before calibration.
        folder: the folder of the calibrated model.
        calibrated: the calibration. It replaces an earlier one.
        measured: whether the evaluation of training is kept, as if the model is saved in its own folder.
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
