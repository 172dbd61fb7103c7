"""``sparse_ffn`` in Triton, for NVIDIA GPUs. The number of tokens decides among three ways:

1 token: a single pass over the rows of active experts (:mod:`lte.ops.triton_token`).
2 to 64: the union of the tokens' experts, with matrix units (:mod:`lte.ops.triton_union`).
More tokens: all experts by cuBLAS, and one kernel that activates and masks (:mod:`lte.ops.triton_masked`).

Weights of int8 and int4 have kernels of their own for 1 token (:mod:`lte.ops.triton_quantised_token`) and for 2 to 64
(:mod:`lte.ops.triton_quantised`). For more tokens they become floats, one matrix at a time.

They do not wait for the host, so they can be captured in CUDA graphs. They use no floating-point atomics, so they give
the same bits in every run. Up to rank 256 they compute the compensation of idle experts. With a higher rank, and for
more than 64 tokens, PyTorch computes it. So it does beside int8 and int4 for more than one token.
"""

import os

import torch
from torch import Tensor

from lte.ops import reference
from lte.ops.triton_masked import masked_ffn
from lte.ops.triton_quantised import quantised_ffn
from lte.ops.triton_quantised_token import quantised_token_ffn
from lte.ops.triton_token import MAX_RANK, MAX_WIDTH, token_ffn
from lte.ops.triton_union import MAX_TOKENS, union_ffn
from lte.ops.weights import FFNWeights

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OF_X = ("up.matrix", "down.matrix", "gate.matrix")  # these must have the dtype of x


def refuses(x_TD: Tensor, weights: FFNWeights) -> str | None:
    """Return why Triton cannot compute this; None if it can."""
    if not x_TD.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton needs a CUDA device, but x is on {x_TD.device}"
    if x_TD.dtype not in DTYPES:
        return f"x is {x_TD.dtype}, and the kernels take float16, bfloat16 and float32"
    if weights.quantised and (reason := _refuses_quantised(weights)):
        return reason
    for name, tensor in weights.named_tensors():
        quantised = tensor.dtype in (torch.int8, torch.uint8)
        if name.startswith(_OF_X) and not quantised and tensor.dtype != x_TD.dtype:
            return f"x is {x_TD.dtype}, but {name} is {tensor.dtype}: convert one of them"
        if tensor.dtype not in DTYPES and not quantised:
            return f"{name} is {tensor.dtype}, and the kernels take float16, bfloat16 and float32"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous: call lte.optimize_ for an FFN, and contiguous() for other tensors"
    if weights.d_model % 16 or weights.d_ff % 16:
        return f"d_model {weights.d_model} and d_ff {weights.d_ff} must be multiples of 16"
    if weights.d_model > MAX_WIDTH:
        return f"d_model {weights.d_model} is above {MAX_WIDTH}"
    if weights.expert_size not in (16, 32, 64, 128) and not (weights.quantised and weights.expert_size == 8):
        return f"an expert has {weights.expert_size} neurons, and the kernels take 16, 32, 64 or 128"
    return None


def _refuses_quantised(weights: FFNWeights) -> str | None:
    up, down, gate = weights.up.matrix, weights.down.matrix, weights.gate and weights.gate.matrix
    if up.scales is None or up.bits != down.bits or (gate and up.bits != gate.bits):
        return "gate, up and down must all be int8, or all int4"
    if weights.router.matrix.bits == 4:
        return "the router is int4: make it int8, or leave it in floats"
    if weights.d_model % 32:
        return f"d_model {weights.d_model} must be a multiple of 32 beside quantised weights"
    return None


def pays(x_TD: Tensor, weights: FFNWeights) -> bool:
    """Return True: where skipping cannot help, Triton does the masked dense computation."""
    return True


def sparse_ffn(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None = None) -> Tensor:
    """As :func:`lte.ops.sparse_ffn.sparse_ffn`."""
    x_TD = x_TD.contiguous()
    if active_TE is not None:
        active_TE = active_TE.contiguous()
    tokens = x_TD.shape[0]
    apart = weights.rank > MAX_RANK or (weights.quantised and 1 < tokens <= MAX_TOKENS)
    if weights.compensation is not None and apart:
        active_TE = reference.route(x_TD, weights.router) if active_TE is None else active_TE
        y_TD = sparse_ffn(x_TD, weights.without_compensation(), active_TE)
        return y_TD + reference.compensation(x_TD, weights.compensation, active_TE)
    few = (quantised_token_ffn, quantised_ffn) if weights.quantised else (token_ffn, union_ffn)
    run = few[tokens > 1] if tokens <= MAX_TOKENS else masked_ffn
    with torch.cuda.device_of(x_TD):  # Triton launches on the current device, which may be another one
        return run(x_TD, weights, active_TE)
