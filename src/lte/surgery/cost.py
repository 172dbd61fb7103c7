"""The cost of a Hugging Face model per token, read off its modules, for any family in the table."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from lte.core.accounting import Cost, Shape, cost
from lte.core.grouping import check_divisible
from lte.modules.sparse_ffn import Selecting
from lte.surgery.sites import find_sites


def model_shape(model: PreTrainedModel, expert_size: int = 32) -> Shape:
    """Count a model's weights by what they do. A dense model is given one linear router an FFN.

    Args:
        model: dense or sparse, on any device, ``meta`` included.
        expert_size: neurons an expert, for a dense model; a sparse one has its routers counted.

    Raises:
        ValueError: unknown family, or an expert size that does not divide d_ff.
    """
    sites = find_sites(model, model.config.model_type)
    routers = [m.router.weight.numel() for m in model.modules() if isinstance(m, Selecting)]
    routers = routers or [site.d_model * check_divisible(site.d_ff, expert_size) for site in sites]
    ffn = {id(linear) for site in sites for linear in site.projections()}
    blocks = {_block(site.name) for site in sites}
    attention, embedding = 0, 0
    head = model.get_output_embeddings()
    head_weights = head.weight.numel() if isinstance(head, nn.Linear) else 0
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            embedding += module.weight.numel()
        if not isinstance(module, nn.Linear | Conv1D) or id(module) in ffn or module is head:
            continue
        if any(name.startswith(f"{block}.") for block in blocks):
            attention += module.weight.numel()
        else:
            head_weights += module.weight.numel()
    if tied:
        embedding -= head_weights
    return Shape(tuple(site.num_weights for site in sites), tuple(routers), attention, head_weights, embedding)


def cost_per_token(
    config: PretrainedConfig | PreTrainedModel,
    sparsity: float | Sequence[float] = 0.0,
    expert_size: int = 32,
    router: bool | None = None,
    bytes_per_weight: float | None = None,
) -> Cost:
    """FLOPs and weight bytes of one token, for a config or a model.

    Args:
        config: e.g. ``LlamaConfig()``; no weights are made. Or a model.
        sparsity: FFN sparsity, one number or one a layer; 0 is dense.
        expert_size: neurons an expert; decides the router's size.
        router: charge the routers. None charges them when ``sparsity`` is above 0.
        bytes_per_weight: None takes the config's dtype, or 2 where it names none.

    Returns:
        ``gflops``, ``ffn_gflops``, ``attention_gflops``, ``router_gflops`` (G = 2^30) and
        ``weight_bytes``, head and embedding apart. LLaMA-7B: 12.0625 dense, 6.59 at 68.9 %.

    Raises:
        ValueError: unknown family, sparsity outside [0, 1], expert size that does not divide d_ff.
    """
    model = config if isinstance(config, PreTrainedModel) else _meta_model(config)
    if bytes_per_weight is None:
        dtype = getattr(model.config, "dtype", None)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        bytes_per_weight = dtype.itemsize if isinstance(dtype, torch.dtype) else 2
    return cost(model_shape(model, expert_size), sparsity, router, bytes_per_weight)


def _meta_model(config: PretrainedConfig) -> PreTrainedModel:
    auto = AutoModelForCausalLM
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForSequenceClassification
    with torch.device("meta"):
        return auto.from_config(config)


def _block(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp``: up to the first number."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])
