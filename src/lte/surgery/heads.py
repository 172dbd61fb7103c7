"""The model classes of a config, by their heads, and the class that a checkpoint was saved from."""

from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

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
"""The heads that are registered for a sparse model."""


def models_of(config_class: type, auto_classes: tuple[str, ...] = AUTO_CLASSES) -> dict[str, type[PreTrainedModel]]:
    """Auto class name -> model class, for a config class."""
    found = {}
    for auto_name in auto_classes:
        mapping = getattr(transformers, auto_name)._model_mapping
        if config_class in mapping:
            models = mapping[config_class]
            found[auto_name] = models[0] if isinstance(models, tuple) else models
    return found


def is_encoder(config: PretrainedConfig) -> bool:
    """Return whether a model of this config sees the tokens after a token, and generates nothing."""
    if config.is_encoder_decoder or getattr(config, "is_decoder", False):
        return False
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING


def own_auto_class(config: PretrainedConfig) -> Any:
    """Return the Auto class of the head that a checkpoint was saved with, or of the most likely head."""
    named = config.architectures or ()
    for auto, one in models_of(type(config)).items():
        if one.__name__ in named:
            return getattr(transformers, auto)
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    if is_encoder(config):
        return transformers.AutoModelForMaskedLM if named else transformers.AutoModel
    return transformers.AutoModelForCausalLM


def own_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the model class that a checkpoint was saved from; None if its config names no known class."""
    known = models_of(type(config), (*AUTO_CLASSES, "AutoModelForPreTraining")).values()
    return next((one for one in known if one.__name__ in (config.architectures or ())), None)


def weight_names(config: PretrainedConfig, *classes: type[PreTrainedModel]) -> set[str]:
    """Return the names of a model's weights, without the prefix of the base model. No weights are made."""
    found = set[str]()
    for one in classes:
        with torch.device("meta"):
            model = one(config)
        found |= {name.removeprefix(f"{one.base_model_prefix}.") for name in model.state_dict()}
    return found


def all_weight_names(config: PretrainedConfig) -> set[str]:
    """As :func:`weight_names`, for every head that this config can have."""
    return weight_names(config, *models_of(type(config), (*AUTO_CLASSES, "AutoModelForPreTraining")).values())
