"""A decoding step in one call: plain PyTorch's results, nothing read that must not be, the same bits every time."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from random_ffn import changed, make_weights, quantised, relative_rms, tensors_of
from torch import Tensor
from torch.nn import functional as F

from lte.ops import reference
from lte.ops.quantise import quantise
from lte.ops.weights import Affine, FFNWeights, Matrix

step = pytest.importorskip("lte.ops.cpu_step")

D, H, KV, WIDTH, SLOTS, VOCAB = 64, 4, 2, 16, 24, 36


def draw(*shape: int, seed: int, dtype=torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5).to(dtype)


def affine(rows: int, columns: int, seed: int, dtype=torch.float32, to=None, bias=False) -> Affine:
    weight = draw(rows, columns, seed=seed, dtype=dtype)
    matrix = Matrix(weight) if to is None else quantise(weight, to)
    return Affine(matrix, draw(rows, seed=seed + 1, dtype=dtype) if bias else None)


def make_layer(seed: int, batch: int, dtype, to, *, dense=False, heads=False, bias=False, window=None, rank=0):
    def linear(rows, columns, seed):
        return affine(rows, columns, seed, dtype, to, bias)

    sparse = make_weights(D, 128, bias=bias, rank=rank, dtype=dtype, seed=seed)
    sparse = sparse if to is None else quantised(sparse, to, router=to == "int8")
    full = step.DenseFFN(linear(128, D, seed + 7), linear(128, D, seed + 8), linear(D, 128, seed + 9), "silu")
    return step.Layer(
        norm=1 + draw(D, seed=seed, dtype=dtype),
        q=linear(H * WIDTH, D, seed + 1),
        k=linear(KV * WIDTH, D, seed + 2),
        v=linear(KV * WIDTH, D, seed + 3),
        o=linear(D, H * WIDTH, seed + 4),
        q_norm=1 + draw(WIDTH, seed=seed + 5, dtype=dtype) if heads else None,
        k_norm=1 + draw(WIDTH, seed=seed + 6, dtype=dtype) if heads else None,
        ffn_norm=1 + draw(D, seed=seed + 7, dtype=dtype),
        ffn=full if dense else sparse,
        keys=draw(batch, KV, SLOTS, WIDTH, seed=seed + 8, dtype=dtype) * 4,
        values=draw(batch, KV, SLOTS, WIDTH, seed=seed + 9, dtype=dtype) * 4,
        window=window,
    )


def make_stack(batch: int, dtype=torch.float32, to=None, **options):
    angles = torch.arange(SLOTS)[:, None] * 0.3 ** torch.arange(WIDTH // 2).repeat(2)
    return step.Stack(
        embedding=draw(VOCAB, D, seed=50, dtype=dtype) * 8,
        layers=[make_layer(100 * index, batch, dtype, to, **options) for index in range(3)],
        norm=1 + draw(D, seed=51, dtype=dtype),
        head=affine(VOCAB, D, 52, dtype, "int8" if to else None),
        cos=angles.cos(),
        sin=angles.sin(),
        eps=1e-5,
        scaling=WIDTH**-0.5,
    )


def linear(x, affine: Affine):
    bias = None if affine.bias is None else affine.bias.float()
    return F.linear(x, affine.matrix.floats(torch.float32), bias)


def norm(x, weight, eps):
    return x if weight is None else F.rms_norm(x, weight.shape, weight.float(), eps)


def expected(stack, token_B, slot_B) -> Tensor:
    """The same step in plain PyTorch and fp32. The caches are not changed."""
    x_BD = stack.embedding[token_B].float()
    for layer in stack.layers:
        normed_BD = norm(x_BD, layer.norm, stack.eps)
        q, k, v = (linear(normed_BD, one).unflatten(-1, (-1, WIDTH)) for one in (layer.q, layer.k, layer.v))
        q, k = norm(q, layer.q_norm, stack.eps), norm(k, layer.k_norm, stack.eps)
        cos, sin = stack.cos[slot_B][:, None], stack.sin[slot_B][:, None]
        q, k = (one * cos + torch.cat([-one[..., WIDTH // 2 :], one[..., : WIDTH // 2]], -1) * sin for one in (q, k))
        mixed = []
        for b, slot in enumerate(slot_B.tolist()):
            first = max(0, slot - layer.window + 1) if layer.window else 0
            keys = torch.cat([layer.keys[b, :, first:slot].float(), k[b, :, None]], 1).repeat_interleave(H // KV, 0)
            values = torch.cat([layer.values[b, :, first:slot].float(), v[b, :, None]], 1)
            scores = (keys @ q[b, :, :, None])[..., 0] * stack.scaling
            mixed.append((scores.softmax(-1)[:, None] @ values.repeat_interleave(H // KV, 0)).flatten())
        x_BD = x_BD + linear(torch.stack(mixed), layer.o)
        normed_BD, ffn = norm(x_BD, layer.ffn_norm, stack.eps), layer.ffn
        if isinstance(ffn, FFNWeights):
            x_BD = x_BD + reference.sparse_ffn(normed_BD, in_fp32(ffn))
        else:
            x_BD = x_BD + linear(F.silu(linear(normed_BD, ffn.gate)) * linear(normed_BD, ffn.up), ffn.down)
    return linear(norm(x_BD, stack.norm, stack.eps), stack.head)


def in_fp32(ffn: FFNWeights) -> FFNWeights:
    floats = {name: one.float() for name, one in ffn.named_tensors() if one.is_floating_point()}
    return changed(ffn, floats)


def tokens(batch: int, slot: int) -> tuple[Tensor, Tensor]:
    return torch.arange(batch) * 5 % VOCAB, (slot + 3 * torch.arange(batch)) % SLOTS


def run(stack, batch: int, slot: int) -> Tensor:
    token_B, slot_B = tokens(batch, slot)
    assert step.refuses(stack) is None
    return step.Step(stack, slot_B)(token_B).clone()


def check(batch: int, slot: int, tolerance: float = 3e-6, **options) -> None:
    stack = make_stack(batch, **options)
    before = [layer.keys.clone() for layer in stack.layers]
    found, want = run(stack, batch, slot), expected(replace_caches(stack, before), *tokens(batch, slot))
    assert relative_rms(found, want) < tolerance


def replace_caches(stack, keys):
    layers = [replace(layer, keys=key) for layer, key in zip(stack.layers, keys, strict=True)]
    return replace(stack, layers=layers)


@pytest.mark.parametrize("batch", [1, 3, 6])
@pytest.mark.parametrize(
    "options",
    [{}, {"dense": True}, {"bias": True, "rank": 3}, {"heads": True, "window": 6}, {"dense": True, "bias": True}],
)
def test_equals_plain_pytorch(batch, options):
    for slot in (0, 3, 17):
        check(batch, slot, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("to", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_as_they_are_stored(dtype, to, dense):
    for batch in (1, 6):
        check(batch, 11, dtype=dtype, to=to, dense=dense)


def test_the_next_step_reads_what_this_one_wrote():
    stack = make_stack(2)
    token_B, slot_B = torch.tensor([3, 7]), torch.tensor([4, 9])
    run_step = step.Step(stack, slot_B)
    for _ in range(4):
        found, want = run_step(token_B).clone(), expected(stack, token_B, slot_B)
        assert relative_rms(found, want) < 3e-6
        token_B = found.argmax(-1)
        slot_B += 1


def test_later_slots_and_idle_experts_are_not_read():
    stack = make_stack(2)
    found = run(stack, 2, 5)
    idle = -1e3 * torch.ones(4)
    closed = [changed(layer.ffn, {"router.bias": idle}) for layer in stack.layers]
    poisoned = make_stack(2)
    for layer, clean in zip(poisoned.layers, stack.layers, strict=True):
        for b, slot in enumerate((5, 8)):
            for cache, source in ((layer.keys, clean.keys), (layer.values, clean.values)):
                cache[b, :, slot:] = float("nan")
                assert source[b, :, slot].isfinite().all()
    assert run(poisoned, 2, 5).equal(found)
    broken = [
        changed(ffn, {name: torch.full_like(tensors_of(ffn)[name], torch.nan) for name in NEURONS}) for ffn in closed
    ]
    clean = [replace(layer, ffn=ffn) for layer, ffn in zip(make_stack(2).layers, closed, strict=True)]
    nan = [replace(layer, ffn=ffn) for layer, ffn in zip(make_stack(2).layers, broken, strict=True)]
    assert run(replace(stack, layers=nan), 2, 5).equal(run(replace(stack, layers=clean), 2, 5))


NEURONS = ("up.matrix.rows", "gate.matrix.rows", "down.matrix.rows")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_same_bits_every_time_with_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dense in (False, True):
            runs = [run(make_stack(3, dense=dense), 3, 9) for _ in range(3)]
            assert all(one.equal(other) for one, other in pairwise(runs))
            want = expected(make_stack(3, dense=dense), *tokens(3, 9))
            assert relative_rms(runs[0], want) < 3e-6
    finally:
        torch.set_num_threads(before)


def test_refusals(monkeypatch):
    def refused(stack, **changes) -> str:
        layers = [replace(stack.layers[0], **changes), *stack.layers[1:]]
        return step.refuses(replace(stack, layers=layers))

    assert "above 24" in step.refuses(make_stack(25))
    stack = make_stack(1)
    assert "one dtype" in refused(stack, norm=stack.norm.bfloat16())
    assert "not contiguous" in refused(stack, q=Affine(Matrix(torch.zeros(D, H * WIDTH).T)))
    assert "multiple of 4" in refused(stack, o=Affine(Matrix(torch.zeros(D + 2, H * WIDTH))))
    assert "width or activation" in refused(stack, ffn=make_weights(D, 256))
    assert "not contiguous" in refused(
        stack, ffn=changed(stack.layers[0].ffn, {"up.matrix.rows": torch.zeros(D, 128).T})
    )
    monkeypatch.setattr(step.cpu, "openmp", lambda: None)
    assert "OpenMP" in step.refuses(stack)
