"""What ``import lte`` makes known to Hugging Face's Auto classes: the model type on disk."""

from typing import Any

from transformers import PretrainedConfig

MODEL_TYPE = "lte"


class LTEAutoConfig(PretrainedConfig):
    """Stands for every LTE config in ``AutoConfig``; reading one gives the class of its base model type."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from lte.surgery.architectures import read_config

        return read_config(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: ``auto_map`` is written by the config of the base model type."""


def register() -> None:
    """Let ``AutoConfig`` read a sparse model's ``config.json``; that makes its classes, and registers these."""
    from transformers import AutoConfig

    AutoConfig.register(MODEL_TYPE, LTEAutoConfig)
