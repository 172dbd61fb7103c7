"""The Triton kernels for int8 and int4: compiled on a GPU, and elsewhere through Triton's interpreter."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from random_ffn import changed, make_active, make_weights, make_x, quantised, relative_rms

from lte.ops import reference, triton_quantised, triton_quantised_token
from lte.ops.quantise import pack_int4
from lte.ops.sparse_ffn import sparse_ffn
from lte.ops.triton_device import device_info
from lte.ops.weights import Matrix

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 9e-3}
HALF = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter's tl.dot is wrong in bf16


def make(to, *args, router=True, **options):
    return quantised(make_weights(*args, device=DEVICE, **options), to, router)


def floats(weights):
    """The same FFN in fp64."""

    def of(part):
        return part and dataclasses.replace(part, matrix=Matrix(part.matrix.floats(torch.float64)))

    parts = {name: of(getattr(weights, name)) for name in ("up", "down", "gate")}
    return dataclasses.replace(weights, **parts, router=of(weights.router))


def tolerance(to, tokens, dtype):
    """The kernel for one token multiplies q + 264 in place of q, and fp32 rounds these larger products."""
    return 2e-5 if (to, tokens, dtype) == ("int4", 1, torch.float32) else TOLERANCE[dtype]


def expected(x, weights, active):
    """The reference in fp64, with the router's choice made in the dtype under test."""
    if active is None:
        active = reference.route(x, weights.router)
    return reference.sparse_ffn(x.double(), floats(weights), active)


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize(
    ("sizes", "tokens", "share", "dtype", "options"),
    [
        ((64, 128, 32), 1, "router", torch.float32, {"bias": True, "rank": 5}),
        ((96, 96, 32), 1, "one", HALF, {"gated": False}),
        ((64, 128, 64), 1, "all", torch.float16, {"bias": True}),
        ((32, 64, 8), 1, "half", HALF, {"rank": 3, "router": False}),
        ((32, 64, 16), 1, "router", HALF, {"router": False}),
        ((32, 64, 16), 1, "none", HALF, {"bias": True}),
        ((576, 64, 32), 1, "router", torch.float16, {"bias": True, "rank": 3}),
        ((896, 64, 64), 1, "half", torch.bfloat16, {}),
        ((576, 64, 8), 1, "half", torch.float32, {"gated": False, "bias": True}),
        ((64, 96, 32), 3, "router", torch.float32, {"bias": True, "rank": 5}),
        ((64, 128, 64), 64, "one", HALF, {"gated": False}),
        ((96, 64, 16), 2, "router", HALF, {"router": False}),
        ((32, 64, 8), 17, "half", HALF, {"bias": True}),
        ((32, 64, 32), 5, "all", HALF, {}),
        ((32, 64, 32), 5, "none", HALF, {"bias": True}),
        ((64, 128, 32), 70, "router", HALF, {"bias": True, "rank": 3}),
    ],
    ids=str,
)
def test_parity(to, sizes, tokens, share, dtype, options):
    weights = make(to, *sizes, dtype=dtype, **options)
    x = make_x(tokens, weights)
    active = None if share == "router" else make_active(tokens, weights, share)
    found = sparse_ffn(x, weights, active, backend="triton")
    assert found.shape == x.shape
    assert found.dtype == dtype
    assert relative_rms(found, expected(x, weights, active)) < tolerance(to, tokens, dtype)


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize(("tokens", "gated"), [(1, False), (3, True)])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activations(to, tokens, gated, act):
    weights = make(to, 32, 32, gated=gated, act=act)
    x = make_x(tokens, weights)
    active = make_active(tokens, weights, "all")
    found = sparse_ffn(x, weights, active, backend="triton")
    assert relative_rms(found, expected(x, weights, active)) < tolerance(to, tokens, torch.float32)


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_inactive_experts_are_not_read(to, tokens):
    weights = make(to, 32, 128, bias=True)
    x, active = make_x(tokens, weights), make_active(tokens, weights, "one")
    idle = (~active.any(0)).repeat_interleave(weights.expert_size)
    assert idle.any()
    changes = {}
    for name, tensor in weights.named_tensors():
        if name.startswith(("up", "gate", "down.matrix")) and len(tensor) > 1:  # down in int8 has scales for all
            rows = idle if len(tensor) == len(idle) else idle[:: len(idle) // len(tensor)]  # scales of int4: a group
            value = float("nan") if tensor.is_floating_point() else 1
            changes[name] = tensor.masked_fill(rows.view(-1, *[1] * (tensor.ndim - 1)), value)
    assert len(changes) == (7 if to == "int8" else 8)
    clean = sparse_ffn(x, weights, active, backend="triton")
    assert clean.isfinite().all()
    assert torch.equal(sparse_ffn(x, changed(weights, changes), active, backend="triton"), clean)


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize(
    ("tokens", "tuning"),
    [(2, (16, 2, 16, 2, 32, 3)), (3, (32, 1, 32, 1, 16, 1)), (17, (16, 4, 16, 3, 64, 2))],
)
def test_any_tuning_gives_the_same(to, tokens, tuning):
    weights = make(to, 96, 96, bias=True)
    x = make_x(tokens, weights)
    found = triton_quantised.quantised_ffn(x, weights, None, triton_quantised.Tuning(*tuning))
    assert relative_rms(found, expected(x, weights, None)) < 1e-6


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("tuning", [(1, 1), (3, 4, 2, 2, 32), (7, 8), (40, 16)])  # 40 programs, at most 6 units
def test_any_tuning_of_one_token_gives_the_same(to, tuning):
    weights = make(to, 96, 96, bias=True, rank=5)
    x = make_x(1, weights)
    found = triton_quantised_token.quantised_token_ffn(x, weights, None, triton_quantised_token.Tuning(*tuning))
    assert relative_rms(found, expected(x, weights, None)) < tolerance(to, 1, torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [32, 576, 4096, 16384])
def test_units_of_one_token_fit_into_registers(bits, width):
    tuning = triton_quantised_token.Tuning.of(torch.device(DEVICE), width, bits)
    words = 2 ** (width * bits // 32 - 1).bit_length()
    assert tuning.rows * words <= 8192
    assert words <= 8 * 32 * tuning.warps or tuning.warps == 16


def test_one_token_at_an_odd_address():
    weights = make("int4", 32, 64, dtype=torch.float16)
    x = make_x(1, weights)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(1, -1)
    assert shifted.data_ptr() % 8
    assert torch.equal(sparse_ffn(shifted, weights, backend="triton"), sparse_ffn(x, weights, backend="triton"))


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_one_token_gives_the_same_bits_twice(to):
    weights = make(to, 96, 96, rank=5)
    x = make_x(1, weights)
    assert torch.equal(sparse_ffn(x, weights, backend="triton"), sparse_ffn(x, weights, backend="triton"))


def test_tunings_fit_the_shared_memory():
    device = torch.device(DEVICE)
    for tokens in (2, 8, 17, 64):
        for bits in (4, 8):
            for itemsize in (2, 4):
                tuning = triton_quantised.Tuning.of(device, tokens, bits, itemsize)
                rows = max(8, tokens) * itemsize + 32 * bits // 8
                assert tuning.stages * tuning.parts * tuning.width * 2 * rows < device_info(device).shared_memory


def test_each_number_of_four_bits():
    """All 256 bytes, each in all places of a word: the rows of up are multiplied by one column at a time."""
    bytes_RJ = torch.arange(256).view(32, 8).repeat(1, 2)
    numbers_RD = torch.cat([(bytes_RJ & 15), bytes_RJ >> 4], dim=1).float() - 8
    up = pack_int4(numbers_RD, torch.ones(1, 32))
    down = pack_int4(torch.eye(32), torch.ones(1, 32))
    weights = make("int4", 32, 32, gated=False, act="relu")
    for tokens in (1, 32):
        for sign in (1, -1):
            x = sign * torch.eye(32)[:tokens].to(DEVICE)
            weights = dataclasses.replace(
                weights,
                up=dataclasses.replace(weights.up, matrix=Matrix(up.rows.to(DEVICE), up.scales.to(DEVICE))),
                down=dataclasses.replace(weights.down, matrix=Matrix(down.rows.to(DEVICE), down.scales.to(DEVICE))),
            )
            found = sparse_ffn(x, weights, torch.ones(tokens, 1, dtype=torch.bool, device=DEVICE), backend="triton")
            assert torch.equal(found.cpu(), (sign * numbers_RD.T[:tokens]).relu())


def test_opcheck_and_torch_compile():
    weights = make("int4", 32, 32)
    x = make_x(1, weights)
    arguments = (x, list(weights.tensors), weights.router.threshold, weights.act, None, "triton")
    torch.library.opcheck(torch.ops.lte.sparse_ffn.default, arguments)
    compiled = torch.compile(lambda x: sparse_ffn(x, weights, backend="triton") + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), sparse_ffn(x, weights, backend="triton") + 1)


def test_refusals():
    int4, int8, floats_ = make("int4", 32, 1024), make("int8", 32, 1024), make_weights(32, 1024, device=DEVICE)
    of_int4 = dataclasses.replace(int4.router, matrix=make("int4", 32, 32).up.matrix)
    for weights, message in (
        (dataclasses.replace(int4, down=int8.down), "all be int8, or all int4"),
        (dataclasses.replace(floats_, router=int8.router), "all be int8, or all int4"),
        (dataclasses.replace(int4, router=of_int4), "the router is int4"),
        (make("int8", 48, 64), "multiple of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_ffn(torch.zeros(1, weights.d_model, device=DEVICE), weights, backend="triton")
    with pytest.raises(ValueError, match="convert one of them"):
        sparse_ffn(torch.zeros(1, 32, device=DEVICE).half(), int4, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 33, 64, 100])
@pytest.mark.parametrize("sizes", [(576, 1536, 32), (896, 4864, 16), (4096, 11008, 32), (3584, 18944, 64)], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_sizes_of_real_models(to, tokens, sizes, dtype):
    weights = make(to, *sizes, dtype=dtype)
    x = make_x(tokens, weights)
    found = sparse_ffn(x, weights, backend="triton")
    assert relative_rms(found, expected(x, weights, None)) < 2 * tolerance(to, tokens, dtype)
    assert torch.equal(found, sparse_ffn(x, weights, backend="triton"))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_in_a_cuda_graph_without_synchronising(to, tokens):
    weights = make(to, 576, 1536, dtype=torch.bfloat16)
    x = make_x(tokens, weights)
    sparse_ffn(x, weights, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            y = sparse_ffn(x, weights, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    x.copy_(make_x(tokens, weights, 5))
    graph.replay()
    assert torch.equal(y, sparse_ffn(x, weights, backend="triton"))
