"""This model runs where the package `lte` is installed: pip install lte."""

from lte.surgery.architectures import (
    LTEAutoConfig,  # noqa: F401
    LTELlamaForCausalLM,  # noqa: F401
    LTELlamaForQuestionAnswering,  # noqa: F401
    LTELlamaForSequenceClassification,  # noqa: F401
    LTELlamaForTokenClassification,  # noqa: F401
    LTELlamaModel,  # noqa: F401
)
