"""Attention over filled slots: compiled on a GPU, elsewhere through Triton's interpreter (see tests/conftest.py)."""

import pytest
import torch

pytest.importorskip("triton")

from random_ffn import relative_rms

from lte.ops.slot_attention import reference, slot_attention

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 9e-3}
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]  # tl.dot of bf16 needs a GPU
SHAPES = [(1, 4, 4, 100, 16), (2, 14, 2, 200, 64), (3, 4, 1, 70, 80), (1, 2, 1, 40, 256), (2, 3, 3, 33, 8)]


def make(batch, heads, shared, slots, width, dtype):
    """Queries, keys, values and spans of odd lengths; what no row sees is NaN."""
    generator = torch.Generator().manual_seed(slots)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    q, keys, values = normal(batch, heads, width), *(normal(batch, shared, slots, width) for _ in range(2))
    last = torch.randint(0, slots, (batch,), generator=generator)
    first = (last - torch.randint(0, slots, (batch,), generator=generator)).clamp(min=0)
    for b in range(batch):
        for one in (keys, values):
            one[b, :, : first[b]] = torch.nan
            one[b, :, last[b] + 1 :] = torch.nan
    return q, keys, values, torch.stack([first, last], -1).to(DEVICE)


def expected(q, keys, values, span, scaling):
    return reference(q.double(), keys.double().nan_to_num(), values.double().nan_to_num(), span, scaling)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(shape, dtype):
    q, keys, values, span = make(*shape, dtype)
    found = slot_attention(q, keys, values, span, 0.3)
    assert found.dtype == dtype
    assert relative_rms(found, expected(q, keys, values, span, 0.3)) < TOLERANCE[dtype]
    assert torch.equal(found, slot_attention(q, keys, values, span, 0.3))


@pytest.mark.parametrize("ends", [(0, 0), (0, 99), (99, 99), (63, 64)])
def test_spans_at_the_edges(ends):
    q, keys, values, _ = make(1, 4, 2, 100, 16, torch.float32)
    keys, values = keys.nan_to_num(), values.nan_to_num()
    span = torch.tensor([ends], device=DEVICE)
    found = slot_attention(q, keys, values, span, 0.5)
    assert relative_rms(found, expected(q, keys, values, span, 0.5)) < TOLERANCE[torch.float32]


def test_views_with_other_strides():
    q, keys, values, span = make(2, 6, 2, 50, 32, torch.float32)
    turned = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in (keys, values)]
    apart = q.repeat_interleave(2, -1)[..., ::2]
    wide = torch.stack([span, span], -1)[..., 0]
    assert torch.equal(slot_attention(apart, *turned, wide, 0.3), slot_attention(q, keys, values, span, 0.3))


def test_the_op_is_what_a_compiler_expects():
    q, keys, values, span = make(1, 4, 2, 20, 16, torch.float32)
    torch.library.opcheck(slot_attention, (q, keys.nan_to_num(), values.nan_to_num(), span, 0.3))
