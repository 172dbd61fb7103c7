"""Loads a model and its tokenizer from a folder, a hub id or a GGUF file."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lte.saving import finish_saving
from lte.surgery.adapter_folder import SETTINGS, has_adapter, load_adapter_, settings_of
from lte.surgery.architectures import forget_gguf_
from lte.surgery.complete import all_tensors, check_complete, check_numbers
from lte.surgery.folder import check_adapter, check_config, check_generation, check_size, count_numbers, present_files
from lte.surgery.generation_settings import keep_generation_settings_
from lte.surgery.gguf_file import check_all_read, check_gguf
from lte.surgery.heads import is_encoder, models_of, own_auto_class
from lte.surgery.reading import read_json, reading
from lte.surgery.tensor_files import StoredTensor, stored_tensors

Head = Literal["causal", "seq2seq", "classification", "own"]
"""``own`` is the head that the checkpoint was saved with, or none if it was saved without."""

_AUTO: dict[Head, Any] = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
}
_OF_TOKENIZER = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


def load_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the config of a model, without its weights. Arguments and errors as for :func:`load_model`."""
    place = _locate(name)
    place.check_config()
    with reading(name):
        config = AutoConfig.from_pretrained(place.path, trust_remote_code=trust_remote_code, **place.kwargs)
    if place.folder is None and place.gguf is None:  # from the hub: it was not checked before
        check_config(name, config.to_dict())
    return config


def classifies(config: PretrainedConfig) -> bool:
    """Return whether a checkpoint's head gives one answer for each row: a class or a number."""
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def check_causal(config: PretrainedConfig, who: str) -> None:
    """Raise ValueError unless the model is a causal language model, without an encoder.

    Args:
        who: the function that asks for the next token, with its verb.
    """
    if config.is_encoder_decoder or is_encoder(config):
        raise ValueError(f"{who} for the next token: it takes a causal language model, not a {config.model_type}")


def class_names_of(config: PretrainedConfig) -> tuple[str, ...] | None:
    """Return the names that a classifier was trained with, in order; None if it has only numbers."""
    labels: dict[Any, str] = config.id2label or {}
    names = tuple(labels[i] for i in sorted(labels)) if classifies(config) else ()
    return names if len(names) > 1 and not all(re.fullmatch(r"LABEL_\d+", name) for name in names) else None


def load_model(
    name: str,
    head: Head = "causal",
    dtype: torch.dtype | str = "auto",
    *,
    new_head: bool = True,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Return a model, dense or sparse, with all weights from its checkpoint.

    Args:
        name: a local folder, a ``.gguf`` file (dequantised on loading), or a hub id.
        head: the head that it gets.
        dtype: of its weights; ``"auto"`` keeps the checkpoint's.
        new_head: whether a checkpoint without this head gets a new, untrained one. Otherwise it is refused.
        trust_remote_code: whether code that comes with the checkpoint may run.
        kwargs: passed to ``from_pretrained``, e.g. ``num_labels``; a head with other labels is replaced by a new one.

    Raises:
        FileNotFoundError: there is no such folder or file, and the hub has no such id or cannot be reached.
        ValueError: the folder holds no model, or a damaged one, or one without the head. Or weights are missing, left
            over, of another shape or not finite.
    """
    place = _locate(name)
    config = load_config(name, trust_remote_code)
    if place.folder is not None and has_adapter(place.folder):
        return _load_adapted(place.folder, config, head, dtype, trust_remote_code)
    auto = own_auto_class(config) if head == "own" else _AUTO[head]
    if place.gguf and dtype == "auto":
        dtype = torch.float32
    held = place.count_numbers()
    if place.gguf and not kwargs:
        kwargs["config"] = config  # reading the file takes seconds
    kwargs["trust_remote_code"] = trust_remote_code
    with reading(name):
        if held is not None:
            check_size(name, auto, config, held, trust_remote_code=trust_remote_code)
        model, report = auto.from_pretrained(
            place.path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **place.kwargs, **kwargs
        )
    _check_loaded(name, model, report, head, new_head, resized="num_labels" in kwargs)
    if place.gguf:
        check_all_read(place.gguf, model)
        forget_gguf_(model)
        model.name_or_path = name  # otherwise its folder
    check_numbers(name, all_tensors(model))
    keep_generation_settings_(model)
    return model


def load_on_meta(
    name: str, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, dict[str, StoredTensor]]:
    """Return a model with its own head as :func:`load_model`, but on the meta device, and the tensors of its files.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no folder with safetensors files; or as :func:`load_model`. Values are not checked.
    """
    place = _locate(name)
    if place.folder is None:
        raise ValueError(f"{name} is no folder of safetensors files: download it first, or load it as a whole")
    config = load_config(name, trust_remote_code)
    place.check_json(("generation_config.json",))
    paths = present_files(place.folder)
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        raise ValueError(f"{name} has no safetensors files: save it with save_pretrained on a machine that can load it")
    stored = stored_tensors(paths)
    auto = own_auto_class(config)
    made = models_of(type(config)).get(auto.__name__)
    if made is None:
        raise ValueError(f"{name} is of the type {config.model_type}, which has no {auto.__name__}")
    with reading(name):
        held = sum(one.on_meta().numel() for one in stored.values())
        check_size(name, auto, config, held, trust_remote_code=trust_remote_code)
        tensors: Any = {key: one.on_meta() for key, one in stored.items()}
        loaded: Any = made.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map="meta",
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        model, report = loaded
        if model.can_generate() and (place.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(place.path)
    _check_loaded(name, model, report, "own", new_head=False)
    keep_generation_settings_(model)
    return model, stored


def _check_loaded(
    name: str, model: Any, report: dict[str, Any], head: Head, new_head: bool, resized: bool = False
) -> None:
    """Raise ValueError unless the model is complete and its generation settings have the right types."""
    if getattr(model, "generation_config", None) is not None:
        check_generation(name, model.generation_config.to_dict())
    check_complete(name, model, report, resized)
    if report["missing_keys"] and not new_head:
        what = "classification" if head == "classification" else "language modelling"
        raise ValueError(
            f"{name} has no head for {what} ({min(report['missing_keys'])} is missing): lte train gives it one"
        )


def _load_adapted(
    folder: Path, config: PretrainedConfig, head: Head, dtype: torch.dtype | str, trust_remote_code: bool
) -> PreTrainedModel:
    """Return the model of a folder with an adapter: the frozen model that it names, with all merged into it."""
    settings, labels = settings_of(folder), {}
    own: Head = "classification" if classifies(config) else "seq2seq" if config.is_encoder_decoder else "own"
    if head == "classification" != own:
        raise ValueError(f"{folder} holds an adapter of a model without a head for classification: give another model")
    if own == "classification":
        labels = {name: getattr(config, name) for name in ("id2label", "label2id", "problem_type")}
    try:
        trained_in = getattr(torch, settings["dtype"])
        model = load_model(settings["base"], own, trained_in, trust_remote_code=trust_remote_code, **labels)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: {folder / SETTINGS} names it as base; correct it there") from error
    model.config.pad_token_id = config.pad_token_id
    load_adapter_(model, folder)
    model.name_or_path = str(folder)  # its base has other weights
    return model if dtype == "auto" else model.to(dtype)  # pyright: ignore


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model. Arguments and errors as for :func:`load_model`."""
    place = _locate(name)
    place.check_config()
    place.check_json(_OF_TOKENIZER)
    with reading(name, "its tokenizer "):
        tokenizer = AutoTokenizer.from_pretrained(place.path, trust_remote_code=trust_remote_code, **place.kwargs)
        files = tokenizer.vocab_files_names.values()
        if place.folder and files and not any((place.folder / one).is_file() for one in files):
            raise ValueError(
                f"{name} has no tokenizer: it needs {' or '.join(files)}"
            )  # otherwise an empty one would be made
        if not isinstance(tokenizer.model_max_length, int | float) or tokenizer.model_max_length < 1:
            raise ValueError(f"{name}: tokenizer_config.json has model_max_length {tokenizer.model_max_length!r}")
        tokenizer.decode(tokenizer("Try it.")["input_ids"])  # some damage shows only in use
    return tokenizer


@dataclass(frozen=True)
class _Place:
    """The place of a model.

    Attributes:
        path: a folder, or a hub id.
        folder, gguf: the folder or the GGUF file, if it is on this machine.
        kwargs: arguments by which ``from_pretrained`` finds it.
    """

    path: str
    folder: Path | None = None
    gguf: Path | None = None
    kwargs: dict[str, str] = field(default_factory=dict)

    def check_config(self) -> None:
        """Raise ValueError unless the folder is a model's with a valid ``config.json``, or the GGUF file is valid."""
        if self.gguf is not None:
            check_gguf(self.gguf)
        if self.folder is not None:
            check_adapter(self.folder)
            if not (self.folder / "config.json").is_file():
                raise ValueError(f"{self.folder} has no config.json: it is not a model saved by save_pretrained")
            check_config(self.path, read_json(self.folder / "config.json"))

    def check_json(self, names: tuple[str, ...]) -> None:
        for path in () if self.folder is None else (self.folder / one for one in names):
            if path.is_file():
                read_json(path)

    def count_numbers(self) -> int | None:
        """Return the number of weights in its files, which are complete; None if it is not on this machine."""
        if self.gguf is not None:
            return check_gguf(self.gguf)
        if self.folder is None:
            return None
        self.check_json(("generation_config.json",))
        held = count_numbers(self.folder)
        if held is None:
            raise ValueError(f"{self.folder} has no weights: it needs a model.safetensors, or shards with their index")
        return held


def _locate(name: str) -> _Place:
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such file")
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise ImportError('reading a GGUF file needs the package gguf: pip install "lte[gguf]"') from error
        return _Place(str(path.parent), gguf=path, kwargs={"gguf_file": path.name})
    if path.is_file():
        raise ValueError(f"{name} is a file: give the folder that holds config.json, a .gguf file or a hub id")
    if path.is_dir():
        finish_saving(path)
        return _Place(str(path), folder=path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such folder")
    return _Place(name)
