"""Linear layers of a quantised model outside of its FFNs: torchao quantises them."""

import logging
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lte.inference.packed_linear import SkippingLinear
from lte.ops.quantise import Quantised
from lte.surgery.sites import linear_sites

logger = logging.getLogger(__name__)

_INT4_GROUP = 64
"""Inputs that share a scale and an offset in torchao's int4: 4.5 bits a weight."""


def quantise_others_(model: PreTrainedModel, to: Quantised) -> None:
    """Quantise the linear layers of the blocks that are no part of an FFN, in place, unless they are quantised already.

    With ``int4`` they are int4 where torchao has a kernel for it: on CUDA, in bf16. Elsewhere they are int8. On a CPU
    the head is int8 too. A step reads it as a whole, and llama.cpp does not keep it in 16 bits either.
    """
    api = torchao()
    floats: dict[str, Any] = {
        site.name: site.linear
        for site in linear_sites(model, model.config.model_type)
        if not site.in_ffn
        and type(site.linear) in (nn.Linear, SkippingLinear)
        and type(site.linear.weight) is nn.Parameter
    }
    for linear in floats.values():
        linear.weight.data = linear.weight.data.contiguous()  # it may be packed by input
    head = model.get_output_embeddings()
    if model.device.type == "cpu" and type(head) is nn.Linear and type(head.weight) is nn.Parameter:
        floats |= {name: head for name, module in model.named_modules() if module is head}
    in_int4 = {name for name, linear in floats.items() if to == "int4" and _has_int4(linear)}
    if to == "int4" and floats.keys() - in_int4:
        logger.info("int4 of torchao needs CUDA, bf16 and inputs in groups of %d: attention is int8", _INT4_GROUP)
    int8 = api.Int8WeightOnlyConfig(set_inductor_config=False)
    api.quantize_(model, int8, filter_fn=lambda _, name: name in floats.keys() - in_int4)
    if in_int4:
        packing = import_module("torchao.quantization.quantize_.workflows").Int4PackingFormat.TILE_PACKED_TO_4D
        int4 = api.Int4WeightOnlyConfig(_INT4_GROUP, set_inductor_config=False, int4_packing_format=packing)
        api.quantize_(model, int4, filter_fn=lambda _, name: name in in_int4)


def _has_int4(linear: nn.Module) -> bool:
    weight = linear.get_parameter("weight")
    return weight.is_cuda and weight.dtype == torch.bfloat16 and weight.shape[1] % _INT4_GROUP == 0


@cache
def torchao() -> Any:
    """Return torchao's module for quantisation.

    Raises:
        ImportError: it is not installed.
    """
    logging.disable(logging.WARNING)  # it warns of kernels that it cannot load, and that lte does not use
    try:
        return import_module("torchao.quantization")
    except ImportError as error:
        raise ImportError(f"a quantised model needs torchao ({error}): pip install 'lte[quant]'") from error
    finally:
        logging.disable(logging.NOTSET)
