"""This model runs where the package `lte` is installed: pip install lte."""

from lte.surgery.architectures import (
    LTEAutoConfig,  # noqa: F401
    LTEOPTForCausalLM,  # noqa: F401
    LTEOPTForQuestionAnswering,  # noqa: F401
    LTEOPTForSequenceClassification,  # noqa: F401
    LTEOPTModel,  # noqa: F401
)
