"""The cost of a Hugging Face model per token, read off its modules, for any family in the table."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from lte.core.accounting import Cost, Shape, cost
from lte.core.grouping import check_divisible
from lte.modules.sparse_ffn import Selecting
from lte.surgery.heads import own_class
from lte.surgery.sites import block_of, find_sites, linear_sites


@dataclass(kw_only=True)
class Spent:
    """What a token took, mean over the tokens that were seen.

    Attributes:
        sparsity: fraction of inactive neurons, mean over tokens and layers; 0 for a dense model. Of a TEAL model the
            fraction of FFN weights that its zeros leave unread.
        layer_sparsity: the same, layer by layer.
        attention_sparsity: fraction of the attention projections' weights left unread; 0 but for TEAL.
        weight_sparsity: fraction of the weights in the blocks' linear layers that are 0, of a model without routers or
            thresholds: :func:`lte.prune_` makes such. Their FLOPs are not counted.
        gflops_per_token, gflops_per_token_dense: FFN, attention projections and routers, G = 2^30. In LTE's mode soft
            every expert is computed, whatever its score.
        mode: dense, soft or hard.
    """

    sparsity: float
    layer_sparsity: list[float]
    gflops_per_token: float
    gflops_per_token_dense: float
    attention_sparsity: float = 0.0
    weight_sparsity: float = 0.0
    mode: str = "dense"


def model_shape(model: PreTrainedModel, expert_size: int = 32) -> Shape:
    """Count a model's weights by what they do. A dense model is given one linear router an FFN.

    Args:
        model: dense or sparse, on any device, ``meta`` included.
        expert_size: neurons an expert, for a dense model; a sparse one has its routers counted.

    Raises:
        ValueError: unknown family, or an expert size that does not divide d_ff.
    """
    sites = find_sites(model, model.config.model_type)
    layers = [module for module in model.modules() if isinstance(module, Selecting)]
    if layers:
        router_weights = tuple(layer.num_weights for layer in layers)
        selection = tuple(s.weights_before(layer.router.reads) for s, layer in zip(sites, layers, strict=True))
    else:
        router_weights = tuple(site.d_model * check_divisible(site.d_ff, expert_size) for site in sites)
        selection = (0,) * len(sites)
    ffn = {id(linear) for site in sites for linear in site.projections().values()}
    blocks = {block_of(site.name) for site in sites}
    head = model.get_output_embeddings()
    attention, head_weights, embedding = 0, 0, 0
    counted = set()  # a weight tied to another is there once; to the head, it is the head's
    if isinstance(head, nn.Linear):
        head_weights, counted = head.weight.numel(), {id(head.weight)}
    for name, module in model.named_modules():
        if (
            not isinstance(module, nn.Embedding | nn.Linear | Conv1D)
            or id(module) in ffn
            or id(module.weight) in counted
        ):
            continue
        counted.add(id(module.weight))
        if isinstance(module, nn.Embedding):
            embedding += module.weight.numel()
        elif any(name.startswith(f"{block}.") for block in blocks):
            attention += module.weight.numel()
        else:
            head_weights += module.weight.numel()
    ffn_weights = tuple(site.num_weights for site in sites)
    return Shape(ffn_weights, router_weights, attention, head_weights, embedding, selection)


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
        router: charge the routers, of a sparse model those it has. None charges them when ``sparsity`` is above 0.
        bytes_per_weight: None takes the model's dtype, or the config's, or 2 where it names none.

    Returns:
        ``gflops``, ``ffn_gflops``, ``attention_gflops``, ``router_gflops`` (G = 2^30) and
        ``weight_bytes``, head and embedding apart. LLaMA-7B: 12.0625 dense, 6.59 at 68.9 %.

    Raises:
        ValueError: unknown family, sparsity outside [0, 1], expert size that does not divide d_ff.
        TypeError: neither a config nor a model.
    """
    if not isinstance(config, PretrainedConfig | PreTrainedModel):
        raise TypeError(
            f"cost_per_token takes a config or a Hugging Face model, not a {type(config).__name__}; "
            "a PeftModel's is its get_base_model()"
        )
    model = config if isinstance(config, PreTrainedModel) else meta_model(config)
    if bytes_per_weight is None and model is config:
        bytes_per_weight = model.dtype.itemsize
    elif bytes_per_weight is None:
        dtype = getattr(model.config, "dtype", None)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        bytes_per_weight = dtype.itemsize if isinstance(dtype, torch.dtype) else 2
    return cost(model_shape(model, expert_size), sparsity, router, bytes_per_weight)


def weight_sparsity(model: PreTrainedModel) -> float:
    """The fraction of weights that are 0 in the linear layers of the blocks."""
    weights = [site.linear.weight for site in linear_sites(model, model.config.model_type)]
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config without weights, on the meta device: of the class it was saved from, if it names one."""
    if (own := own_class(config)) is not None:
        with torch.device("meta"):
            return own(config)
    if config.is_encoder_decoder:
        auto = AutoModelForSeq2SeqLM
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        auto = AutoModelForCausalLM
    else:
        auto = AutoModelForSequenceClassification
    with torch.device("meta"):
        return auto.from_config(config)
