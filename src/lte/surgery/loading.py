"""Loading a model and its tokenizer from a folder, a hub id or a GGUF file."""

import re
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from lte.saving import complete
from lte.surgery.architectures import forget_gguf_

Head = Literal["causal", "seq2seq", "classification"]

_AUTO: dict[Head, Any] = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
}


def load_config(name: str) -> PretrainedConfig:
    """The config of a model, without its weights. Arguments and errors as :func:`load_model`."""
    path, kwargs = _locate(name)
    return _explained(name, lambda: AutoConfig.from_pretrained(path, **kwargs))


def classifies(config: PretrainedConfig) -> bool:
    """Whether a checkpoint has a head with one answer a row: classes, or a number."""
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def check_causal(config: PretrainedConfig, who: str) -> None:
    """Refuse a model that reads what comes after a token.

    Args:
        who: asks for the next token, and the verb.

    Raises:
        ValueError: it is an encoder, or has one.
    """
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or encoder:
        raise ValueError(f"{who} for the next token: it takes a causal language model, not a {config.model_type}")


def class_names_of(config: PretrainedConfig) -> tuple[str, ...] | None:
    """The names that a classifier was trained with, in order; None where it has none but numbers."""
    labels: dict[Any, str] = config.id2label or {}
    names = tuple(labels[i] for i in sorted(labels)) if classifies(config) else ()
    return names if len(names) > 1 and not all(re.fullmatch(r"LABEL_\d+", name) for name in names) else None


def load_model(
    name: str,
    head: Head = "causal",
    dtype: torch.dtype | str = "auto",
    *,
    new_head: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """A model, dense or sparse.

    Args:
        name: a local folder, a ``.gguf`` file (dequantised on loading), or a hub id.
        head: which head it gets.
        dtype: of its weights; ``"auto"`` keeps the checkpoint's.
        new_head: whether a checkpoint without this head gets one, untrained; else it is refused.
        kwargs: passed to ``from_pretrained``, e.g. ``num_labels``; a head with other labels is replaced by a new one.

    Raises:
        FileNotFoundError: no such folder or file, and the hub has no such id or cannot be reached.
        ValueError: the folder holds no model, or a damaged one, or one without the head.
    """
    path, gguf = _locate(name)
    if gguf and dtype == "auto":
        dtype = torch.float32
    if "num_labels" in kwargs:
        kwargs.setdefault("ignore_mismatched_sizes", True)  # e.g. a checkpoint trained on another task
    kwargs = {"dtype": dtype, **gguf, **kwargs}
    model, report = _explained(name, lambda: _AUTO[head].from_pretrained(path, output_loading_info=True, **kwargs))
    missing = [key for key in report["missing_keys"] if not key.startswith(f"{model.base_model_prefix}.")]
    if missing and not new_head:
        what = "classification" if head == "classification" else "language modelling"
        raise ValueError(f"{name} has no head for {what} ({min(missing)} is missing): lte train gives it one")
    if gguf:
        forget_gguf_(model)
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model. Arguments and errors as :func:`load_model`."""
    path, kwargs = _locate(name)
    return _explained(name, lambda: AutoTokenizer.from_pretrained(path, **kwargs))


def _locate(name: str) -> tuple[str, dict[str, str]]:
    """Path or hub id, and the GGUF file's name if it is one."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such file")
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise ImportError('reading a GGUF file needs the package gguf: pip install "lte[gguf]"') from error
        return str(path.parent), {"gguf_file": path.name}
    if path.is_file():
        raise ValueError(f"{name} is a file: give the folder that holds config.json, a .gguf file or a hub id")
    if path.is_dir():
        complete(path)
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} has no config.json: it is not a model saved by save_pretrained")
        return str(path), {}
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such folder")
    return name, {}


def _explained(name: str, load: Any) -> Any:
    try:
        return load()
    except OSError as error:
        if Path(name).expanduser().exists():
            raise ValueError(f"{name}: {_first_line(error)}") from error
        raise FileNotFoundError(
            f"{name}: no such folder, and the hub has no such model or cannot be reached ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
