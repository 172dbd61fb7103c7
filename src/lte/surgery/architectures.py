"""Saving and loading: ``LTE...`` classes, made on demand from Hugging Face's and registered with the Auto classes.

``LTELlamaForCausalLM`` is ``LlamaForCausalLM`` whose FFNs are replaced before weights are loaded. In memory its config
is a Llama config with a section of its conversion: methods have ``lte``. On disk ``config.json`` has ``model_type:
lte`` and ``base_model_type: llama``. So code without ``lte`` refuses the model and does not run it densely. A stock
class that is named directly, as in ``LlamaForCausalLM.from_pretrained``, fails at ``transformers_weights``, which has
the reason in place of a file name. Every class is an attribute of this module under its own name, so that it can be
pickled and found from ``auto_map``.
"""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import HfApi
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lte.files import write_whole
from lte.saving import finish_saving, saving
from lte.surgery.auto import MODEL_TYPE, LTEAutoConfig
from lte.surgery.complete import check_complete
from lte.surgery.conversion import Conversion, conversion_of, is_sparse, section_of
from lte.surgery.heads import models_of
from lte.surgery.quantise import check_savable
from lte.surgery.tensor_parallel import shard_experts_

CODE_FILE = "modeling_lte"
REFUSAL = "this model is sparse and stock classes would run it densely: pip install lte, import lte, use AutoModel..."
FASTER_GENERATE = "_faster_generate"
"""The attribute of a model that has a function to call instead of Hugging Face's ``generate``."""
_ON_DISK = ("base_model_type", "transformers_weights")
_MADE_FROM = "_made_from"
"""The attribute of an ``LTE...`` class that has the class of Hugging Face from which it was made."""
_CLASSES: dict[type, type] = {}


class LTEConfigMixin:
    """The part of an ``LTE...Config`` that Hugging Face's lacks: a section, and its own model type on disk."""

    lte: dict[str, Any]
    """The method and its options. A conversion that is no method has its own section instead."""

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        values = json.loads(self.to_json_string(use_diff=use_diff))  # pyright: ignore[reportAttributeAccessIssue]
        values |= {
            "model_type": MODEL_TYPE,
            "base_model_type": self.model_type,  # pyright: ignore[reportAttributeAccessIssue]
            "auto_map": _auto_map(type(self)),
            "transformers_weights": REFUSAL,
        }
        write_whole(json_file_path, json.dumps(values, indent=2, sort_keys=True) + "\n")

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        values, rest = super().get_config_dict(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return (_in_memory(values) if values.get("model_type") == MODEL_TYPE else values), rest

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: :meth:`to_json_file` writes ``auto_map``."""

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        result = super().save_pretrained(save_directory, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        names = sorted({ref.partition(".")[2] for ref in _auto_map(type(self)).values()})
        write_whole(
            Path(save_directory) / f"{CODE_FILE}.py",
            '"""This model runs where the package `lte` is installed: pip install lte."""\n\n'
            f"from {__name__} import (\n" + "".join(f"    {name},  # noqa: F401\n" for name in names) + ")\n",
        )
        return result


def read_config(config_dict: dict[str, Any], **kwargs: Any) -> Any:
    """Return the config of a sparse model from its ``config.json``. It has the class of its base model type."""
    values = _in_memory(config_dict)
    return lte_config_class(CONFIG_MAPPING[values["model_type"]]).from_dict(values, **kwargs)  # pyright: ignore


def _in_memory(values: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a ``config.json`` in the form of its base model type."""
    base_type = values.get("base_model_type")
    if not isinstance(base_type, str) or not is_sparse(values):
        section = "lte" if isinstance(base_type, str) else "base_model_type"
        raise ValueError(
            f"config.json says model_type {MODEL_TYPE}, but its section {section} is missing or damaged: "
            "save the model again with save_pretrained"
        )
    if base_type not in CONFIG_MAPPING:
        raise ValueError(
            f"config.json has base_model_type {base_type!r}, which transformers does not know: update transformers, "
            f"or make your own architecture known with AutoConfig.register({base_type!r}, ...) before loading"
        )
    made = conversion_of(values)  # check now, so that errors come early
    assert made is not None
    if lacking := made.lacking(section_of(values)):
        raise ValueError(
            f"config.json lacks {', '.join(lacking)} in its section {made.section}: it was written by hand or is "
            "damaged, save the model again with save_pretrained"
        )
    return {**{name: value for name, value in values.items() if name not in _ON_DISK}, "model_type": base_type}


class LTEModelMixin:
    """The part of an ``LTE...`` model that Hugging Face's lacks. Sparse FFNs or thresholds come before the weights."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        assert isinstance(self, PreTrainedModel)
        made = conversion_of(config)
        if made is None or made.stock:
            raise ValueError(f"{type(self).__name__} needs a config with a section lte; make one with lte.sparsify_")
        made.install_(self)
        _make_buffers_(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's, but weights that do not fit the model are an error.

        A head that the checkpoint lacks is initialised. All other weights must be there.

        Raises:
            ValueError: a weight file is incomplete or damaged, weights are missing, left over or of another shape, or
                tensor parallelism cannot divide the experts.
        """
        if pretrained_model_name_or_path is not None:
            finish_saving(pretrained_model_name_or_path)
        wants_info = kwargs.pop("output_loading_info", False)
        resized = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # checked below, with a message of one line
                **kwargs,
            )
        except SafetensorError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: a .safetensors file is cut short or damaged ({error}); copy it again"
            ) from error
        check_complete(pretrained_model_name_or_path, model, info, resized)
        shard_experts_(model)
        return (model, info) if wants_info else model

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As Hugging Face's, but the folder holds the old model or the new one, even if this process is killed.

        With ``push_to_hub`` the model is uploaded after it is saved.

        Raises:
            NotWritten: the disk is full, permissions are missing, or the like.
            ValueError: torchao quantised weights of the model.
        """
        check_savable(cast(PreTrainedModel, self))
        writes = getattr(self, "should_save_on_this_rank", bool)(is_main_process)
        save = partial(super().save_pretrained, is_main_process=is_main_process)  # pyright: ignore
        if kwargs.get("distributed_checkpoint") or not writes:  # each process writes its own part, or nothing
            save(save_directory, push_to_hub=push_to_hub, **kwargs)
        else:
            upload = _upload_of(save_directory, kwargs) if push_to_hub else None
            with saving(save_directory) as fresh:
                save(fresh, **kwargs)
                names = [path.name for path in fresh.iterdir()]
            if upload is not None:
                upload(allow_patterns=names)
        wait_for_all = getattr(self, "barrier_after_gathered_checkpoint_save", None)
        if wait_for_all is not None:  # Hugging Face waits for the files to be written, not for them to be moved
            wait_for_all(getattr(self.config, "distributed_config", None))  # pyright: ignore

    def generate(self, *args: Any, **options: Any) -> Any:
        """As Hugging Face's. A model may have a faster way, which :func:`lte.optimize_` gives it."""
        faster = vars(self).get(FASTER_GENERATE)
        return hugging_face_generate(self)(*args, **options) if faster is None else faster(self, *args, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the config writes ``auto_map``."""


def hugging_face_generate(model: Any) -> Callable[..., Any]:
    """Return Hugging Face's own ``generate`` of a model, sparse or dense."""
    return super(LTEModelMixin, model).generate if isinstance(model, LTEModelMixin) else model.generate  # pyright: ignore


def _upload_of(folder: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """Return the upload for options of ``save_pretrained``, and remove these options. Its repository is made now."""
    api = HfApi(token=options.get("token"))
    name, private = options.pop("repo_id", Path(folder).name), options.pop("private", None)
    repo = api.create_repo(name, private=private, exist_ok=True).repo_id
    message, create_pr = options.pop("commit_message", "Upload model"), options.pop("create_pr", False)
    return partial(api.upload_folder, repo_id=repo, folder_path=folder, commit_message=message, create_pr=create_pr)


def lte_config_class(base: type) -> type[PretrainedConfig]:
    """Return ``LTE<base>``, registered with every Auto class that has a model for ``base``."""
    if base not in _CLASSES:
        _CLASSES[base] = _subclass(LTEConfigMixin, base)
        for auto_name, model_class in models_of(base).items():
            getattr(transformers, auto_name).register(_CLASSES[base], lte_model_class(model_class))
    return _CLASSES[base]


def lte_model_class(base: type) -> type[PreTrainedModel]:
    """Return ``LTE<base>``: the same head on a model with sparse FFNs.

    Raises:
        ValueError: the class is in the code of a checkpoint, which a saved sparse model could not find.
    """
    if base.__module__.split(".")[0] == "transformers_modules":
        raise ValueError(
            f"{base.__name__} is code of its checkpoint: a sparse model saved from it could not be loaded. Make the "
            "class known in a program of your own, with AutoConfig.register and AutoModel...register"
        )
    config_class = lte_config_class(base.config_class)  # pyright: ignore[reportAttributeAccessIssue]
    if base not in _CLASSES:
        _CLASSES[base] = _subclass(LTEModelMixin, base)
        _CLASSES[base].config_class = config_class  # pyright: ignore[reportAttributeAccessIssue]
        if renamed := get_checkpoint_conversion_mapping(base.__name__):  # weights that files have under other names
            register_checkpoint_conversion_mapping(_CLASSES[base].__name__, renamed, overwrite=True)
    return _CLASSES[base]


def _subclass(mixin: type, base: type) -> type:
    """Return the class. It keeps ``base`` itself: other libraries add to ``__bases__``."""
    return type(
        f"LTE{base.__name__}", (mixin, base), {"__module__": __name__, "__doc__": mixin.__doc__, _MADE_FROM: base}
    )


def _make_buffers_(model: Any) -> None:
    """Put buffers from the meta device on the default device. A checkpoint fills them.

    An engine may make only the parameters on the meta device and fill only these (vLLM). ``from_pretrained`` makes
    both there. Then the default device is the meta device, and nothing changes.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def dense_class(made: type) -> Any:
    """Return the Hugging Face model class from which :func:`lte_model_class` made this one."""
    return getattr(made, _MADE_FROM)


def dense_config(config: Any) -> Any:
    """Return a copy of an LTE config in its Hugging Face form."""
    base, made = getattr(type(config), _MADE_FROM), conversion_of(config)
    assert made is not None
    left_out = (made.section, "auto_map", "architectures")
    return base.from_dict({name: value for name, value in config.to_dict().items() if name not in left_out})


def become_lte_(model: PreTrainedModel, conversion: Conversion, **state: Any) -> None:
    """Change a converted model's class and config to their LTE forms. Its old config object does not change.

    Args:
        conversion: the conversion for the config.
        state: keys of its section besides the options.
    """
    base, copies, section = type(model.config), {}, {**conversion.to_dict(), **state}
    part: Any
    for part in model.modules():  # the head and the backbone share one config object or have copies of it
        if isinstance(config := getattr(part, "config", None), PretrainedConfig):
            part.config = copy.deepcopy(config, copies)
            if type(config) is base:
                part.config.__class__ = lte_config_class(base)
                setattr(part.config, conversion.section, section)
    model.__class__ = lte_model_class(type(model))
    forget_gguf_(model)


def forget_gguf_(model: PreTrainedModel) -> None:
    """Remove the mark "quantized" of a model from a GGUF file. Its weights are plain floats."""
    loaded: Any = model
    if getattr(loaded, "hf_quantizer", None) is not None:
        loaded.hf_quantizer = None
        loaded.is_quantized = False
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config


def _auto_map(config_class: type) -> dict[str, str]:
    base = getattr(config_class, _MADE_FROM)
    models = {name: f"{CODE_FILE}.LTE{model.__name__}" for name, model in models_of(base).items()}
    return {"AutoConfig": f"{CODE_FILE}.{LTEAutoConfig.__name__}", **models}


def __getattr__(name: str) -> type:
    """Make ``LTELlamaConfig``, ``LTELlamaForCausalLM`` and so on when they are first used."""
    made = next((made for made in _CLASSES.values() if made.__name__ == name), None)
    if made is not None:
        return made
    base = getattr(transformers, name.removeprefix("LTE"), None) if name.startswith("LTE") else None
    if isinstance(base, type) and issubclass(base, PretrainedConfig):
        return lte_config_class(base)
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return lte_model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
