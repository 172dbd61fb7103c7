"""Saving and loading: ``LTE...`` classes, made on demand from Hugging Face's, known to the Auto classes.

``LTELlamaForCausalLM`` is ``LlamaForCausalLM`` whose FFNs are replaced before weights are loaded.
Its ``config.json`` has ``model_type: lte``, so that code which does not know ``lte`` refuses it
instead of running it densely; ``base_model_type`` says what it is made from. Every class is an
attribute of this module, under its own name, which makes it picklable and reachable from ``auto_map``.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lte.surgery.method import Method

MODEL_TYPE = "lte"
CODE_FILE = "modeling_lte"
_CLASSES: dict[str, type] = {}

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMultipleChoice",
)
"""The heads that are made known for a sparse model."""


class LTEConfigMixin:
    """What an ``LTE...Config`` adds to Hugging Face's: its own model type on disk, and ``config.lte``."""

    lte: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()  # pyright: ignore[reportAttributeAccessIssue]
        values["base_model_type"] = self.model_type  # pyright: ignore[reportAttributeAccessIssue]
        values["model_type"] = MODEL_TYPE
        values["auto_map"] = _auto_map(type(self))
        return values

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        values, rest = super().get_config_dict(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if values.get("model_type") == MODEL_TYPE:
            values["model_type"] = cls.model_type  # pyright: ignore[reportAttributeAccessIssue]
        return values, rest

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: ``auto_map`` is written by :meth:`to_dict`."""

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        result = super().save_pretrained(save_directory, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        names = sorted({ref.partition(".")[2] for ref in _auto_map(type(self)).values()})
        (Path(save_directory) / f"{CODE_FILE}.py").write_text(
            '"""This model runs where the package `lte` is installed: pip install lte."""\n\n'
            f"from {__name__} import (\n" + "".join(f"    {name},  # noqa: F401\n" for name in names) + ")\n"
        )
        return result


class LTEAutoConfig(PretrainedConfig):
    """Stands for every LTE config in ``AutoConfig``; reading one gives the class of its base model type."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        base_type = config_dict.get("base_model_type")
        if base_type not in CONFIG_MAPPING or "lte" not in config_dict:
            raise ValueError(
                "config.json says model_type lte, but its base_model_type is "
                f"{base_type!r} and its section lte is {'there' if 'lte' in config_dict else 'missing'}: "
                "the file is damaged, save the model again with save_pretrained"
            )
        config_class = lte_config_class(CONFIG_MAPPING[base_type])
        return config_class.from_dict({**config_dict, "model_type": base_type}, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: ``auto_map`` is written by the config of the base model type."""


class LTEModelMixin:
    """What an ``LTE...`` model adds to Hugging Face's: sparse FFNs, put in before weights are loaded."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        from lte.surgery.convert import install_, set_mode_  # they build on this module
        from lte.surgery.sites import find_sites

        if not hasattr(config, "lte"):
            raise ValueError(f"{type(self).__name__} needs a config with a section lte; make one with lte.sparsify_")
        values = {name: value for name, value in config.lte.items() if name != "mode"}
        method = Method.from_dict(values)
        assert isinstance(self, nn.Module)
        for site in find_sites(self, config.model_type):
            router = install_(site, method).router
            if not router.weight.is_meta:
                router.reset()
        set_mode_(self, config.lte.get("mode", "dense"))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's, but files that lack weights of the model, or are cut short, are an error.

        Raises:
            ValueError: truncated or damaged weight file, missing weights.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: a .safetensors file is cut short or damaged ({error}); copy it again"
            ) from error
        same_head = cls.__name__ in (model.config.architectures or [])
        missing = sorted(
            name
            for name in info["missing_keys"]
            if same_head or name.startswith(f"{cls.base_model_prefix}.")  # pyright: ignore[reportAttributeAccessIssue]
        )
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path}: {len(missing)} weights are missing, first {missing[0]}; "
                "the checkpoint is incomplete, save or copy it again"
            )
        return (model, info) if wants_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: ``auto_map`` is written by the config."""


def lte_config_class(base: type) -> type[PretrainedConfig]:
    """``LTE<base>``, registered with every Auto class that has a model for ``base``."""
    name = f"LTE{base.__name__}"
    if name not in _CLASSES:
        _CLASSES[name] = type(name, (LTEConfigMixin, base), {"__module__": __name__, "__doc__": LTEConfigMixin.__doc__})
        for auto_name, model_class in _models_of(base).items():
            getattr(transformers, auto_name).register(_CLASSES[name], lte_model_class(model_class))
    return _CLASSES[name]


def lte_model_class(base: type) -> type[PreTrainedModel]:
    """``LTE<base>``: the same head on a model with sparse FFNs."""
    name = f"LTE{base.__name__}"
    if name not in _CLASSES:
        members = {"__module__": __name__, "__doc__": LTEModelMixin.__doc__}
        _CLASSES[name] = type(name, (LTEModelMixin, base), members)
        _CLASSES[name].config_class = lte_config_class(base.config_class)  # pyright: ignore[reportAttributeAccessIssue]
    return _CLASSES[name]


def become_lte_(model: PreTrainedModel, lte: dict[str, Any]) -> None:
    """Change a converted model's class and config to their LTE forms, in place."""
    config_class = lte_config_class(type(model.config))
    model_class = lte_model_class(type(model))
    for part in model.modules():  # the head and the backbone share one config object, or hold copies of it
        if isinstance(config := getattr(part, "config", None), PretrainedConfig) and not hasattr(config, "lte"):
            config.__class__ = lte_config_class(type(config))
            config.lte = lte  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(model.config, config_class)
    model.__class__ = model_class
    if getattr(model, "hf_quantizer", None) is not None:  # set by GGUF loading, though the weights are plain floats
        model.hf_quantizer = None
        model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _models_of(config_class: type) -> dict[str, type]:
    """Auto class name -> model class, for a Hugging Face config class."""
    found = {}
    for auto_name in AUTO_CLASSES:
        mapping = getattr(transformers, auto_name)._model_mapping
        if config_class in mapping:
            models = mapping[config_class]
            found[auto_name] = models[0] if isinstance(models, tuple) else models
    return found


def _auto_map(config_class: type) -> dict[str, str]:
    _mixin, base = config_class.__bases__
    models = {name: f"{CODE_FILE}.LTE{model.__name__}" for name, model in _models_of(base).items()}
    return {"AutoConfig": f"{CODE_FILE}.{LTEAutoConfig.__name__}", **models}


def __getattr__(name: str) -> type:
    """``LTELlamaConfig``, ``LTELlamaForCausalLM`` and so on, made when first asked for."""
    base = getattr(transformers, name.removeprefix("LTE"), None) if name.startswith("LTE") else None
    if isinstance(base, type) and issubclass(base, PretrainedConfig):
        return lte_config_class(base)
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return lte_model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_lte_folder(folder: Path) -> bool:
    """Whether a folder holds a model saved by ``lte``."""
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("model_type") == MODEL_TYPE


AutoConfig.register(MODEL_TYPE, LTEAutoConfig)
