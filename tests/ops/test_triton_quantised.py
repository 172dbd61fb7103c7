"""The Triton kernels for int8 and int4: compiled on a GPU, and elsewhere through Triton's interpreter."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from random_ffn import changed, make_active, make_weights, make_x, quantised, relative_rms

from lte.ops import reference, triton_quantised, triton_quantised_union
from lte.ops.quantise import pack_int4
from lte.ops.sparse_ffn import sparse_ffn
from lte.ops.weights import Matrix

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 9e-3}
HALF = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter's tl.dot is wrong in bf16


def make(to, *args, router=True, **options):
    return quantised(make_weights(*args, device=DEVICE, **options), to, router)


def floats(weights):
    """The same FFN in fp64."""

    def of(part):
        return part and dataclasses.replace(part, matrix=Matrix(part.matrix.floats(torch.float64)))

    parts = {name: of(getattr(weights, name)) for name in ("up", "down", "gate")}
    return dataclasses.replace(weights, **parts, router=of(weights.router))


def expected(x, weights, active):
    """The reference in fp64, with the router's choice made in the dtype under test."""
    if active is None:
        active = reference.route(x, weights.router)
    return reference.sparse_ffn(x.double(), floats(weights), active)


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize(
    ("sizes", "tokens", "dtype", "options"),
    [
        ((64, 256, 32), 1, torch.float32, {"bias": True, "rank": 5}),
        ((96, 160, 32), 1, torch.bfloat16, {"gated": False}),
        ((576, 128, 64), 1, torch.float16, {"bias": True}),
        ((32, 96, 8), 1, HALF, {"router": False, "rank": 3}),
        ((64, 64, 16), 1, HALF, {"router": False}),
        ((96, 160, 32), 3, torch.float32, {"bias": True, "rank": 5}),
        ((64, 128, 64), 64, HALF, {"gated": False}),
        ((576, 96, 16), 2, HALF, {"router": False}),
        ((32, 96, 8), 17, HALF, {"bias": True}),
        ((64, 128, 32), 70, HALF, {"bias": True, "rank": 3}),
    ],
    ids=str,
)
def test_parity(to, sizes, tokens, dtype, options):
    weights = make(to, *sizes, dtype=dtype, **options)
    x = make_x(tokens, weights)
    for share in ("none", "one", "half", "all", "router"):
        active = None if share == "router" else make_active(tokens, weights, share)
        found = sparse_ffn(x, weights, active, backend="triton")
        assert found.shape == x.shape
        assert found.dtype == dtype
        assert relative_rms(found, expected(x, weights, active)) < TOLERANCE[dtype], share
