"""Registers the model type ``lte`` of saved models with Hugging Face's Auto classes, at ``import lte``."""

from typing import Any

from transformers import PretrainedConfig

MODEL_TYPE = "lte"


class LTEAutoConfig(PretrainedConfig):
    """The class of every LTE config for ``AutoConfig``. Reading a config gives the class of its base model type."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from lte.surgery.architectures import read_config

        return read_config(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the config of the base model type writes ``auto_map``."""


def register() -> None:
    """Let ``AutoConfig`` read a sparse model's ``config.json``. Reading makes and registers the classes."""
    from transformers import AutoConfig

    AutoConfig.register(MODEL_TYPE, LTEAutoConfig)
