"""Generation settings of a checkpoint, which a model made from it keeps."""

from typing import Any

from transformers import GenerationConfig


class AsItWas(GenerationConfig):
    """Generation settings some of which have no effect, such as a temperature without ``do_sample``.

    Many published checkpoints have them. They load with no more than a warning, and may not be saved once any other is
    changed, which ``Trainer`` does to the special tokens. Of this class they are saved as they were read.
    """

    def validate(self, strict: bool = False, *args: Any, **kwargs: Any) -> None:
        super().validate(False, *args, **kwargs)


def keep_generation_settings_(model: Any) -> None:
    """Let a model's generation settings be saved as they were read.

    Raises:
        ValueError: they contradict each other, so that the model would neither generate nor be loaded again.
    """
    settings = getattr(model, "generation_config", None)
    if type(settings) is not GenerationConfig:
        return
    try:
        settings.validate(strict=True)
        return
    except ValueError:
        pass  # also of what is worth no more than a warning
    try:
        settings.validate()
    except ValueError as error:
        raise ValueError(f"the model's generation_config cannot be used, nor saved: {error}") from error
    settings.__class__ = AsItWas
