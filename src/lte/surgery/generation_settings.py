"""Keeps the generation settings of a checkpoint in a model that is made from it."""

from typing import Any

from transformers import GenerationConfig


class AsItWas(GenerationConfig):
    """Generation settings that may hold some without effect, such as a temperature without ``do_sample``.

    Many published checkpoints have them. They load with a warning. transformers refuses to save them after a change of
    another setting, and ``Trainer`` changes the special tokens. This class saves them as they were read.
    """

    def validate(self, strict: bool = False, *args: Any, **kwargs: Any) -> None:
        super().validate(False, *args, **kwargs)


def keep_generation_settings_(model: Any) -> None:
    """Make a model's generation settings saveable as they were read.

    Raises:
        ValueError: the settings contradict each other. Such a model could not generate and could not be loaded again.
    """
    settings = getattr(model, "generation_config", None)
    if type(settings) is not GenerationConfig:
        return
    try:
        settings.validate(strict=True)
        return
    except ValueError:
        pass  # also for settings that only give a warning
    try:
        settings.validate()
    except ValueError as error:
        raise ValueError(f"the model's generation_config cannot be used, nor saved: {error}") from error
    settings.__class__ = AsItWas
