"""TEAL: small inputs of every linear layer are taken for 0 (Liu et al., arXiv 2408.14690). No routers, no training."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.core.accounting import Cost, G
from lte.methods.choosing import count_tokens
from lte.methods.cuts import sample, set_cuts_
from lte.methods.teal_allocation import greedy_sparsities
from lte.modules.tensor_parallel import check_not_shared
from lte.surgery.activations import Wanted, check_inputs_are_tokens, first_tokens, record_inputs
from lte.surgery.architectures import become_lte_, lte_model_class
from lte.surgery.cost import cost_per_token
from lte.surgery.sites import check_linears, linear_sites
from lte.surgery.teal import SECTION, TEALConfig


@torch.no_grad()
def teal_(model: PreTrainedModel, config: TEALConfig, data: Iterable[dict[str, Tensor]]) -> PreTrainedModel:
    """Give every linear layer of the blocks a threshold on its inputs, in place; the model is sparse at once.

    Thresholds are quantiles of the inputs' sizes, set one layer after the other in one pass over the data, each
    behind layers that are sparse by then. Every token is treated alike, whatever else is in its batch; padding is
    left out of the quantiles. The model's class becomes ``LTE...``, so that it saves under its own name, and the names
    of its weights stay: only ``*.cut`` is new.

    Args:
        model: dense, of a known family with one stack of blocks.
        config: ``TEALConfig``.
        data: batches for the model.

    Returns:
        The same model.

    Raises:
        ValueError: unknown family, an encoder-decoder, a model that is sparse already, data that is empty, weights that
            are quantised. The model is then as it was.
    """
    if model.config.is_encoder_decoder:
        raise ValueError("TEAL here is for models with one stack of blocks, not for an encoder-decoder")
    if hasattr(model.config, "lte") or hasattr(model.config, SECTION):
        raise ValueError("the model is sparse already: load the dense checkpoint to convert it")
    check_not_shared(model, "teal_ wants")
    check_inputs_are_tokens(model.config)
    check_linears(model, model.config.model_type)
    lte_model_class(type(model))  # made now, so that an error leaves the model as it was
    batches = first_tokens(data, config.tokens)
    if not batches:
        raise ValueError("TEAL needs data, but the data is empty")
    tokens = min(config.tokens, count_tokens(batches))
    config.install_(model)
    become_lte_(model, config.to_dict(), SECTION)
    layers = {site.name: site.linear for site in linear_sites(model, model.config.model_type)}
    wanted: list[Wanted] = [(name, linear, lambda x_TI: sample(x_TI.abs(), tokens)) for name, linear in layers.items()]
    sparsity = dict.fromkeys(layers, config.target_sparsity)
    if config.allocation == "greedy":
        model.eval()
        sizes = dict(zip(layers, record_inputs(model, wanted, batches, tokens), strict=True))
        sparsity = greedy_sparsities(model, layers, sizes, batches[0], config.target_sparsity)
    set_cuts_(model, wanted, [sparsity[name] for name in layers], batches, tokens)
    return model.eval()


def teal_cost(
    model: PreTrainedModel, sparsity: float | Mapping[str, float], bytes_per_weight: float | None = None
) -> Cost:
    """FLOPs and weight bytes of one token where linear layers skip the weights of inputs that are 0.

    As :func:`~lte.surgery.cost.cost_per_token` counts, and to be compared with what that gives for other methods:
    ``gflops`` is FFN and attention projections together, ``weight_bytes`` is what they read. Comparing sizes with a
    threshold is not counted, as activations are not.

    Args:
        model: dense or converted by :func:`teal_`.
        sparsity: fraction of inputs that are 0, one number or one a linear layer of the blocks, by name.
        bytes_per_weight: None takes the model's dtype.

    Raises:
        ValueError: unknown family, a sparsity outside [0, 1], one missing.
    """
    dense = cost_per_token(model, 0.0, bytes_per_weight=bytes_per_weight)
    size = model.dtype.itemsize if bytes_per_weight is None else bytes_per_weight
    sites = linear_sites(model, model.config.model_type)
    names = [site.name for site in sites]
    by_name = dict.fromkeys(names, sparsity) if isinstance(sparsity, int | float) else sparsity
    if missing := {*names} - by_name.keys():
        raise ValueError(f"no sparsity given for {len(missing)} linear layers, first {min(missing)}")
    if not all(0 <= by_name[name] <= 1 for name in names):
        raise ValueError(f"sparsity is {sparsity}, but it is a fraction between 0 (dense) and 1")
    saved = {site.name: by_name[site.name] * site.linear.weight.numel() for site in sites}
    total, ffn = sum(saved.values()), sum(saved[site.name] for site in sites if site.in_ffn)
    return replace(
        dense,
        gflops=dense.gflops - 2 * total / G,
        ffn_gflops=dense.ffn_gflops - 2 * ffn / G,
        attention_gflops=dense.attention_gflops - 2 * (total - ffn) / G,
        weight_bytes=round(dense.weight_bytes - total * size),
    )
