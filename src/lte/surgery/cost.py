"""The cost of a Hugging Face model per token, counted from its modules, for any family in the table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
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
from lte.modules.quantised_linear import QuantisedLinear
from lte.modules.sparse_ffn import Selecting
from lte.surgery.heads import own_class
from lte.surgery.sites import block_of, find_sites, linear_sites


@dataclass(kw_only=True)
class Spent:
    """The cost of a token, as a mean over the measured tokens.

    Attributes:
        sparsity: fraction of inactive neurons, mean over tokens and layers; 0 for a dense model. For TEAL it is the
            fraction of FFN weights that zeros leave unread.
        layer_sparsity: the same for each layer.
        attention_sparsity: fraction of the attention projections' weights that zeros among inputs leave unread, by
            TEAL or by the ``attention_sparsity`` of LTE; 0 for other models.
        weight_sparsity: fraction of weights that are 0 in the blocks' linear layers, for a model without routers or
            thresholds (see :func:`lte.prune_`). Their FLOPs are not counted.
        gflops_per_token, gflops_per_token_dense: FFN, attention projections and routers, G = 2^30. LTE's mode soft
            computes every expert.
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
    """Count a model's weights by their role. A dense model counts with one linear router for each FFN.

    Args:
        model: dense or sparse, on any device, ``meta`` included.
        expert_size: neurons of an expert, for a dense model. A sparse model counts its own routers.

    Raises:
        ValueError: the family is unknown, or the expert size does not divide d_ff.
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
    attention_bytes, by_torchao = 0, False
    counted = set()  # a tied weight counts once; if it is tied to the head, it is the head's
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
            attention_bytes += _stored_bytes(module.weight)
            by_torchao |= hasattr(module.weight, "__tensor_flatten__")
        else:
            head_weights += module.weight.numel()
    ffn_weights = tuple(site.num_weights for site in sites)
    linears = [linear for site in sites for linear in site.projections().values()]
    quantised = [linear.matrix for linear in linears if isinstance(linear, QuantisedLinear)]
    return Shape(
        *(ffn_weights, router_weights, attention, head_weights, embedding, selection),
        ffn_bytes=sum(matrix.nbytes for matrix in quantised) / sum(ffn_weights) if quantised else None,
        attention_bytes=attention_bytes / attention if by_torchao else None,
    )


def _stored_bytes(weight: Tensor) -> int:
    """Return the bytes of a weight. One that torchao quantised has parts."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    parts: Any = weight.__tensor_flatten__()[0]  # pyright: ignore[reportAttributeAccessIssue]
    return sum(getattr(weight, name).nbytes for name in parts)


def cost_per_token(
    config: PretrainedConfig | PreTrainedModel,
    sparsity: float | Sequence[float] = 0.0,
    expert_size: int = 32,
    router: bool | None = None,
    bytes_per_weight: float | None = None,
    attention_sparsity: float = 0.0,
) -> Cost:
    """Return FLOPs and weight bytes of one token, for a config or a model.

    Args:
        config: e.g. ``LlamaConfig()``; no weights are made. Or a model.
        sparsity: FFN sparsity, one number or one for each layer; 0 is dense.
        expert_size: neurons of an expert, which decides the router's size.
        router: whether routers are charged. None charges them if ``sparsity`` is above 0.
        bytes_per_weight: None takes the model's dtype, or the config's, or 2 if it names none.
        attention_sparsity: fraction of the attention projections' weights that zeros among inputs leave unread.

    Returns:
        ``gflops``, ``ffn_gflops``, ``attention_gflops``, ``router_gflops`` (G = 2^30) and
        ``weight_bytes``, without head and embedding. LLaMA-7B has 12.0625 dense and 6.59 at 68.9 %.

    Raises:
        ValueError: the family is unknown, the sparsity is outside [0, 1], or the expert size does not divide d_ff.
        TypeError: the argument is neither a config nor a model.
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
    return cost(model_shape(model, expert_size), sparsity, router, bytes_per_weight, attention_sparsity)


def weight_sparsity(model: PreTrainedModel) -> float:
    """Return the fraction of weights that are 0 in the linear layers of the blocks."""
    weights = [site.linear.weight for site in linear_sites(model, model.config.model_type)]
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model of this config on the meta device, of the class that the config names if it names one."""
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
