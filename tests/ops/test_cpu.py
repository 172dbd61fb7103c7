"""The CPU backend: the definition's results, nothing of an inactive expert read, the same bits every time."""

import dataclasses

import pytest
import torch
from random_ffn import make_active, make_weights, make_x, relative_rms

from lte.ops import reference
from lte.ops.weights import FFNWeights

cpu = pytest.importorskip("lte.ops.cpu")

# Of the result's own rounding: the sums are fp32 whatever the dtype
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
DTYPES = list(TOLERANCE)


def in_fp32(weights: FFNWeights) -> FFNWeights:
    return dataclasses.replace(weights, **{name: tensor.float() for name, tensor in weights.tensors().items()})


def error(y_TD, x_TD, weights, active_TE=None) -> float:
    assert y_TD.dtype == x_TD.dtype
    assert y_TD.shape == x_TD.shape
    return relative_rms(y_TD, reference.sparse_ffn(x_TD.float(), in_fp32(weights), active_TE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("d_model", "d_ff", "expert_size"), [(48, 96, 16), (80, 256, 128), (576, 288, 32)])
def test_equals_the_reference(d_model, d_ff, expert_size, gated, bias, dtype):
    weights = make_weights(d_model, d_ff, expert_size, gated=gated, bias=bias, dtype=dtype)
    for tokens in (1, 3, 17, 130):
        x_TD = make_x(tokens, weights)
        assert error(cpu.sparse_ffn(x_TD, weights), x_TD, weights) < TOLERANCE[dtype]
        for share in ("none", "one", "half", "all"):
            active_TE = make_active(tokens, weights, share)
            assert error(cpu.sparse_ffn(x_TD, weights, active_TE), x_TD, weights, active_TE) < TOLERANCE[dtype]
