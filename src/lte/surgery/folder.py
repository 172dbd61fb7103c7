"""Checks of a model's folder before a model is built from it: its config, and whether its files are complete."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from lte.surgery.reading import check_file, read_json

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The file names that transformers looks for, in this order. Each may also be an index of shards."""
MOST = 2000
"""The most layers and experts that a model can have."""
MOST_LABELS = 10**6
NEW_HEAD = 2**26
"""The number of weights that a new head may have besides those of a checkpoint."""
MOST_BUFFERS = 2**32
"""Bytes that a model may have besides its weights."""

_COUNTS = re.compile(r"(^n_|_)(layers?|experts|blocks)$|^layers$")


def check_config(name: str, values: dict[str, Any]) -> None:
    """Check a ``config.json`` before transformers reads it.

    Raises:
        ValueError: the model is quantised, or the config has values of a wrong type or impossibly many layers, experts
            or labels.
    """
    quantised = values.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "an unknown method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"{name} is quantised by {method}: lte needs plain weights. Give the checkpoint that it was made from, "
            "or a .gguf file, which is dequantised on loading"
        )
    named = values.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(one, str) for one in named)):
        raise ValueError(f"{name}: config.json has architectures {named!r}, but a list of class names is needed")
    labels = values.get("id2label")
    if isinstance(labels, dict) and not all(isinstance(one, str) for one in labels.values()):
        raise ValueError(f"{name}: config.json has id2label {labels!r}, but each label has to be a text")
    code = values.get("auto_map")
    if code is not None and not (isinstance(code, dict) and all(isinstance(one, str | list) for one in code.values())):
        raise ValueError(f"{name}: config.json has auto_map {code!r}, but it maps classes of transformers to names")
    for key, value in _numbers(values):
        most = MOST_LABELS if key == "num_labels" else MOST if _COUNTS.search(key) else None
        if most is not None and value > most:
            raise ValueError(f"{name}: config.json has {key} {value}, but more than {most} cannot be right")
        if value != value:
            raise ValueError(f"{name}: config.json has {key} NaN, but a number is needed")


def check_generation(name: str, values: dict[str, Any]) -> None:
    """Raise ValueError unless options of generation have the right types: ids are integers, others are numbers.

    transformers accepts wrong types, and fails or never stops later.
    """
    for key, value in values.items():
        several = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is not None and not all(_fits(key, one) for one in several):
            raise ValueError(f"{name}: its generation_config.json has {key} {value!r}, which is of the wrong type")


_MOST_ID = 2**31  # of a token's id
_SWITCHES = ("do_", "use_", "output_", "return_")
_NUMBERS = ("temperature", "top_k", "top_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
_NUMBERS += ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences")


def _fits(option: str, value: Any) -> bool:
    if option.endswith("token_id"):
        return type(value) is int and abs(value) < _MOST_ID
    if option.startswith(_SWITCHES):
        return isinstance(value, bool)
    return option not in _NUMBERS or isinstance(value, int | float)


def _numbers(values: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _numbers(value, str(name))
    elif isinstance(values, list) and key == "attention_types":  # GPT-Neo's: kinds of layers, and the number of each
        for value in values:
            yield from _numbers(value, "num_layers" if isinstance(value, int) else key)
    elif isinstance(values, int | float):
        yield key, values


def check_adapter(folder: Path) -> None:
    """Raise ValueError, with how to merge it, if a folder holds an adapter."""
    path = folder / "adapter_config.json"
    if path.is_file():
        base = read_json(path).get("base_model_name_or_path", "its base model")
        raise ValueError(
            f"{folder} holds an adapter of {base}: merge the two first, with peft.AutoPeftModelForCausalLM"
            f".from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(FOLDER), and give FOLDER"
        )


def count_numbers(folder: Path) -> int | None:
    """Return the number of weights in a folder's weight files, from their headers; None if there are no such files.

    For files without a header it is the most that they can hold.

    Raises:
        ValueError: a file is missing, incomplete or damaged.
    """
    files = present_files(folder)
    counts = (_count_in(path) if path.suffix == ".safetensors" else path.stat().st_size for path in files)
    return sum(counts) if files else None


def present_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder; [] if it has none.

    Raises:
        ValueError: a file is missing or empty, or the index of shards is damaged.
    """
    files = _weight_files(folder)
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy it again")
        check_file(path)
    return files


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards or not all(isinstance(one, str) for one in shards.values()):
                raise ValueError(f"{index} has no weight_map from names of weights to files: copy it again")
            outside = next((one for one in shards.values() if Path(one).name != one), None)
            if outside is not None:
                raise ValueError(f"{index} names {outside}, which is no file of the folder: copy it again")
            return [folder / one for one in sorted(set(shards.values()))]
    return []


def _count_in(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): copy it again") from error


def check_size(name: str, auto: Any, config: PretrainedConfig, held: int, **kwargs: Any) -> None:
    """Raise ValueError if a config's model has more weights than its files, before it takes memory.

    Args:
        name: the model's name in messages.
        auto: the Auto class that would load it.
        config: of the model.
        held: the number of weights in the weight files.
    """
    with torch.device("meta"):
        model = auto.from_config(config, **kwargs)
    saved = model.state_dict().keys()  # quantised experts are buffers
    buffers = dict(model.named_buffers())
    needed = sum(one.numel() for one in model.parameters())
    needed += sum(buffer.numel() for name, buffer in buffers.items() if name in saved)
    kept = sum(buffer.nbytes for name, buffer in buffers.items() if name not in saved)
    if needed > 2 * held + NEW_HEAD or kept > MOST_BUFFERS:
        raise ValueError(
            f"{name}: config.json describes a model of {needed:,} weights, but the files hold {held:,}: "
            "they do not belong together"
        )
