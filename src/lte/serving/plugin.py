"""The entry point ``vllm.general_plugins``: makes vLLM know sparse models. vLLM calls it in each of its processes.

``AutoConfig`` can read ``config.json`` of a sparse model as soon as the package ``lte`` is imported.
"""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def register() -> None:
    """Tell vLLM which class serves ``LTELlamaForCausalLM`` and so on. It imports the class when a model needs it."""
    from vllm import ModelRegistry  # pyright: ignore

    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        ModelRegistry.register_model(f"LTE{name}", "lte.serving.vllm:TransformersForCausalLM")
