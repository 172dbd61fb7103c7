"""Where an evaluated model comes from, for the row of ``lte eval --json``: ``lte report`` sorts rows by it."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from lte.evaluation.measuring import Spent
from lte.evaluation.record import SUMMARY
from lte.files import write_whole
from lte.surgery.conversion import conversion_of, is_sparse
from lte.surgery.reading import read_json

_CALIBRATED = "calibrated_by"
_FEW_ZEROS = 0.01  # a model with fewer weights that are 0 is dense: some are 0 by rounding


def origin(name: str, config: PretrainedConfig, spent: Spent, argv: Sequence[str]) -> dict[str, Any]:
    """The command, the model, its method with its options, and how the model was trained, where its folder says so.

    What training wrote is left out where another command has put a model of another method into the folder since.

    Args:
        name: the model's, as given to ``lte eval``.
        config: the model's.
        spent: what was measured of it.
        argv: of ``lte eval``.
    """
    method = _method(config, spent)
    row = {"command": shlex.join(["lte", "eval", *argv]), "model": name, "method": method}
    return row | training_of(name, method["method"])


def training_of(name: str, method: str) -> dict[str, Any]:
    """How a model of this method was trained, where its folder says so: command, seed, recipe and steps.

    After the command comes that of ``lte calibrate`` which has moved the thresholds since.
    """
    path = Path(name) / SUMMARY
    trained = read_json(path) if path.is_file() else {}
    made = "dense" if trained.get("recipe") == "dense" else (trained.get("method") or {}).get("method")
    if made != method:
        return {}
    return {
        "trained_by": " && ".join(trained[name] for name in ("command", _CALIBRATED) if trained.get(name)),
        **{name: trained.get(name) for name in ("seed", "recipe", "steps")},
    }


def keep_calibration(model: Path, folder: Path, argv: Sequence[str], measured: bool) -> None:
    """Where a folder says how its model was trained, let that of the calibrated one say so, and what was done since.

    Args:
        model: whose thresholds were moved.
        folder: where it is saved.
        argv: of ``lte calibrate``.
        measured: whether to keep what training measured, as where the model is saved in its own place.
    """
    if (model / SUMMARY).is_file():
        trained = read_json(model / SUMMARY)
        trained[_CALIBRATED] = shlex.join(["lte", "calibrate", *argv])
        if not measured:
            trained.pop("evaluation", None)
        write_whole(folder / SUMMARY, json.dumps(trained, indent=2) + "\n")


def _method(config: PretrainedConfig, spent: Spent) -> dict[str, Any]:
    if not is_sparse(config) and spent.weight_sparsity < _FEW_ZEROS:
        return {"method": "dense"}
    made = conversion_of(config)
    return {"method": "pruned-weights"} if made is None else {"method": made.name, **made.to_dict()}
