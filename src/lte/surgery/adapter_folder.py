"""A folder with an adapter: all that was trained beside a frozen model, and the name of that model."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lte.files import write_whole
from lte.surgery.adapters import Adapters
from lte.surgery.conversion import is_sparse, section_of
from lte.surgery.convert import install_routers_, set_mode_
from lte.surgery.method import Method, mode_of
from lte.surgery.reading import read_json

SETTINGS = "lte_adapter.json"
WEIGHTS = "lte_adapter.safetensors"


def has_adapter(folder: Path) -> bool:
    return (folder / SETTINGS).is_file()


def save_adapters(adapters: Adapters, folder: str | Path) -> None:
    """Write adapters, routers and all else that was trained into a folder that has the model's ``config.json``."""
    folder, model = Path(folder), adapters.model
    name = model.name_or_path
    settings = {
        "base": str(Path(name).resolve()) if name and Path(name).exists() else name,
        "dtype": str(adapters.dtype).removeprefix("torch."),
        "rank": adapters.rank,
        "targets": adapters.targets,
        "fingerprint": adapters.given,
    }
    save_file({name: one.cpu().contiguous() for name, one in adapters.state().items()}, folder / WEIGHTS)
    write_whole(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")


def settings_of(folder: Path) -> dict[str, Any]:
    """Return the settings of a folder with an adapter.

    Raises:
        ValueError: the file is damaged.
    """
    settings = read_json(folder / SETTINGS)
    kinds = {"base": str, "dtype": str, "rank": int, "targets": list, "fingerprint": str}
    for name, kind in kinds.items():
        if not isinstance(settings.get(name), kind):
            raise ValueError(f"{folder / SETTINGS} has {name} {settings.get(name)!r}: copy it again")
    return settings


def load_adapters(adapters: Adapters, folder: Path) -> None:
    """Let a new run's adapters go on from those of a folder.

    Raises:
        ValueError: the folder has none or damaged ones, or the frozen model is another one.
    """
    if not has_adapter(folder):
        raise ValueError(f"{folder} has no {SETTINGS}: its run had no lora_rank")
    settings = settings_of(folder)
    if settings["fingerprint"] != adapters.given:
        raise ValueError(
            f"the adapter in {folder} was trained on the weights of {settings['base'] or 'another model'}, and this "
            "model has others, or its neurons are in another order, or it was loaded in another dtype than "
            f"{settings['dtype']}: give that model"
        )
    adapters.load(_tensors_in(folder))


def load_adapter_(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Make a model the sparse model that was trained with ``lora_rank``, in place, from a folder with its adapter.

    Args:
        model: the model that the training began with, in the same dtype.
        folder: of ``lte train --lora-rank N --save-adapter``, or one of its checkpoints.

    Returns:
        The same model, with everything merged. It is a sparse model like any other.

    Raises:
        ValueError: the folder has no adapter or a damaged one, or the model is another one.
        ImportError: peft is missing.
    """
    folder = Path(folder)
    settings, config = settings_of(folder), read_json(folder / "config.json")
    section = config.get("lte", {})
    if not is_sparse(model.config):
        install_routers_(model, Method.from_dict(section))
    adapters = Adapters(model, settings["rank"], settings["targets"])
    load_adapters(adapters, folder)
    adapters.finish()
    section_of(model.config).clear()
    section_of(model.config).update(section)
    set_mode_(model, mode_of(model.config))
    return model


def _tensors_in(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} is missing, cut short or damaged ({error}): copy it again") from error
