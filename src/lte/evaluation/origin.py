"""The origin of a model: its method, and the commands that made it. Commands write it to a folder and read it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from lte.evaluation.environment import environment
from lte.evaluation.measuring import Spent
from lte.evaluation.record import SUMMARY, Made, Measured, Record, plain, records_in
from lte.files import write_whole
from lte.surgery.conversion import Conversion, conversion_of, is_sparse
from lte.surgery.method import Method, mode_of
from lte.surgery.reading import read_json

_CALIBRATED, _CALIBRATED_BY = "calibrated", "calibrated_by"
"""Keys of a summary for the last calibration of the model: as :class:`Made`, and its command as a caption."""
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
    """Return how a model of this method was made, as fields of a record; {} if its folder does not say it."""
    path = Path(name) / SUMMARY
    if not path.is_file():
        return {}
    summary = read_json(path)
    made = summary.get("made") or []  # an old summary has no such fields
    since = [summary[_CALIBRATED]] if "made" in summary and _CALIBRATED in summary else []
    try:
        (trained,) = records_in({**summary, "made": [*made, *since], "evaluation": {}})
        made_as = "dense" if trained.recipe == "dense" else trained.method.get("method")
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, it does not say how the model was made ({error}): delete it") from None
    if made_as != method:
        return {}
    return {
        "trained_by": " && ".join(filter(None, (trained.command, summary.get(_CALIBRATED_BY)))),
        **{name: getattr(trained, name) for name in ("made", "seed", "recipe", "steps")},
    }


def keep_conversion(config: PretrainedConfig, folder: Path, made: Made, conversion: Conversion) -> None:
    """Write to the folder of a converted model how it was made. The conversion follows the work of earlier commands.

    Args:
        config: of the model before the conversion.
        folder: the folder of the converted model.
        made: the conversion, with the name of the model that it was given.
        conversion: the same as a config. Its seed is that of the record, unless an earlier command had one.
    """
    method = _options(conversion)
    before = training_of(made.model, _kind(config))
    seed = before.get("seed")
    if seed is None:
        seed = method.get("seed")
    elif method.get("seed"):
        made = replace(made, options={**made.options, "seed": method["seed"]})
    _keep_step(folder, before, made, method, seed)


def keep_quantisation(config: PretrainedConfig, folder: Path, made: Made) -> None:
    """Write to the folder of a quantised model how it was made: what the model's folder says, and the quantisation.

    Args:
        config: of the model.
        folder: the folder of the quantised model.
        made: the quantisation, with the name of the model that it was given.
    """
    conversion = conversion_of(config)
    assert conversion is not None
    before, method = training_of(made.model, conversion.name), _options(conversion)
    _keep_step(folder, before, made, method, before.get("seed", method.get("seed")))


def _keep_step(folder: Path, before: Mapping[str, Any], made: Made, method: Mapping[str, Any], seed: Any) -> None:
    """Write the summary of a model: the work of earlier commands, as :func:`training_of` gives it, and the last."""
    earlier = before.get("made", ())
    steps = (*earlier, replace(made, model="") if earlier else made)
    _write(
        folder,
        {
            "command": " && ".join(filter(None, (before.get("trained_by"), made.command))),
            "model": steps[0].model,
            "made": [asdict(step) for step in steps],
            "method": method,
            "seed": seed,
        },
    )


def keep_calibration(name: str, config: PretrainedConfig, folder: Path, calibrated: Made, measured: bool) -> None:
    """Write to the folder of a calibrated model how it was made: what the model's folder says, and the calibration.

    Args:
        name: the name of the model before calibration, as it was given.
        config: of that model.
        folder: the folder of the calibrated model.
        calibrated: the calibration. It replaces an earlier one.
        measured: whether the evaluation of training is kept, as if the model is saved in its own folder.
    """
    if training_of(name, kind := _kind(config)):
        summary = read_json(Path(name) / SUMMARY)
    else:
        summary = {"model": name, "made": [], "method": {"method": kind}}
    if summary.get("made") == []:
        calibrated = replace(calibrated, model=summary.get("model") or name)
    summary |= {_CALIBRATED_BY: calibrated.command, _CALIBRATED: asdict(calibrated)}
    if not measured:
        summary.pop("evaluation", None)
    _write(folder, summary)


def _write(folder: Path, summary: Mapping[str, Any]) -> None:
    write_whole(folder / SUMMARY, json.dumps(plain(summary), indent=2) + "\n")


def _kind(config: PretrainedConfig) -> str:
    conversion = conversion_of(config)
    return "dense" if conversion is None else conversion.name


def _method(config: PretrainedConfig, spent: Spent) -> dict[str, Any]:
    if not is_sparse(config) and spent.weight_sparsity < _FEW_ZEROS:
        return {"method": "dense"}
    made = conversion_of(config)
    return {"method": "pruned-weights"} if made is None else _options(made)


def _options(conversion: Conversion) -> dict[str, Any]:
    return {"method": conversion.name, **conversion.to_dict()}  # TEAL's own dictionary has no name
