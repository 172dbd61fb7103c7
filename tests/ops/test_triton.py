"""The Triton kernels: compiled on a GPU, and elsewhere through Triton's interpreter (see tests/conftest.py).

The interpreter is slow, so there a test of many parameters runs a choice of their combinations (:func:`combinations`).
"""

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton")

from random_ffn import changed, make_active, make_weights, make_x, relative_rms, tensors_of

from lte.ops import reference, triton_masked, triton_router, triton_token, triton_union
from lte.ops.sparse_ffn import sparse_ffn
from lte.ops.triton_device import device_info
from lte.ops.weights import FFNWeights

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 9e-3}
TOKENS = [0, 1, 3, 17, 64, 65, 130]


def combinations(names, *values, chosen):
    """All combinations of ``values`` on a GPU, those ``chosen`` in the interpreter.

    The choice has to have each value, with each of the three kernels where the number of tokens is a parameter.
    """
    names = names.split()
    kernels = [kernel_of(case[names.index("tokens")]) if "tokens" in names else "any" for case in chosen]
    for position, (name, ones) in enumerate(zip(names, values, strict=True)):
        seen = {(kernel, case[position]) for kernel, case in zip(kernels, chosen, strict=True)}
        possible = set(itertools.product(set(kernels) - {"none"}, ones))
        if name == "tokens":
            possible = {(kernel_of(one), one) for one in ones}
        elif name == "dtype":
            possible -= {("union", torch.bfloat16)}  # see computed_shares
        assert possible <= seen, f"the choice lacks {possible - seen} of {name}"
    return pytest.mark.parametrize(names, list(itertools.product(*values)) if ON_GPU else chosen, ids=str)


def kernel_of(tokens):
    return "none" if not tokens else "token" if tokens == 1 else "union" if tokens <= 64 else "masked"


def upcast(weights: FFNWeights) -> FFNWeights:
    return changed(weights, {name: tensor.double() for name, tensor in weights.named_tensors()})


def expected(x, weights, active):
    """The reference in fp64, with the router's choice made in the dtype under test."""
    if active is None:
        active = reference.route(x, weights.router)
    return reference.sparse_ffn(x.double(), upcast(weights), active)


def poisoned(weights, active):
    """``weights``, NaN wherever no token wants them, and ``active``; None stands for the router's choice."""
    if active is None:
        return weights, active
    idle = (~active.any(0)).repeat_interleave(weights.expert_size)
    changes = {
        name: tensor.masked_fill(idle.view(-1, *[1] * (tensor.ndim - 1)), float("nan"))
        for name, tensor in weights.named_tensors()
        if name in ("up.matrix.rows", "gate.matrix.rows", "down.matrix.rows", "up.bias", "gate.bias")
    }
    return changed(weights, changes), active


def computed_shares(dtype, tokens):
    """Shares of experts, or the router's choice, that can be tried: the interpreter's ``tl.dot`` is wrong in bf16."""
    if ON_GPU or dtype != torch.bfloat16 or tokens <= 1:
        return ["none", "one", "half", "all", "router"]
    if tokens <= triton_union.MAX_TOKENS:
        pytest.skip("all of it is tl.dot")
    return ["none", "one", "half", "all"]


@combinations(
    "gated bias dtype tokens",
    [False, True],
    [False, True],
    DTYPES,
    TOKENS,
    chosen=[
        (True, True, torch.float32, 0),
        (False, False, torch.float32, 1),
        (False, True, torch.float16, 1),
        (True, False, torch.bfloat16, 1),
        (False, False, torch.float16, 3),
        (False, True, torch.float32, 17),
        (True, False, torch.float16, 17),
        (True, True, torch.float16, 64),
        (False, True, torch.float32, 65),
        (True, False, torch.float16, 65),
        (True, True, torch.bfloat16, 130),
    ],
)
def test_parity(gated, bias, dtype, tokens):
    shares = computed_shares(dtype, tokens)
    weights = make_weights(48, 160, 32, gated=gated, bias=bias, dtype=dtype, device=DEVICE)
    x = make_x(tokens, weights)
    for share in shares:
        active = None if share == "router" else make_active(tokens, weights, share)
        found = sparse_ffn(x, weights, active, backend="triton")
        assert found.shape == x.shape
        assert found.dtype == dtype
        if tokens:
            assert relative_rms(found, expected(x, weights, active)) < TOLERANCE[dtype], share


@combinations(
    "rank bias dtype tokens",
    [1, 5, 16, 64],
    [False, True],
    DTYPES,
    [1, 3, 17, 64, 70],
    chosen=[
        (1, False, torch.float32, 1),
        (5, True, torch.float16, 1),
        (16, False, torch.bfloat16, 1),
        (64, True, torch.float32, 1),
        (1, True, torch.float16, 3),
        (5, False, torch.float32, 3),
        (64, True, torch.float32, 3),
        (16, True, torch.float32, 17),
        (64, False, torch.float16, 17),
        (5, True, torch.float32, 64),
        (1, True, torch.bfloat16, 70),
        (5, False, torch.float32, 70),
        (16, False, torch.float16, 70),
        (64, True, torch.float32, 70),
    ],
)
def test_compensation(rank, bias, dtype, tokens):
    shares = computed_shares(dtype, tokens)
    weights = make_weights(48, 160, 32, bias=bias, rank=rank, dtype=dtype, device=DEVICE)
    x = make_x(tokens, weights)
    for share in shares:
        active = None if share == "router" else make_active(tokens, weights, share)
        found = sparse_ffn(x, weights, active, backend="triton")
        assert relative_rms(found, expected(x, weights, active)) < TOLERANCE[dtype], share
        if share == "half":
            assert relative_rms(found, expected(x, weights.without_compensation(), active)) > 0.05


@pytest.mark.parametrize("tokens", [1, 3])
def test_compensation_takes_no_launch_of_its_own(tokens, monkeypatch):
    launched = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for module in (triton_token, triton_router, triton_union):
        for name in ("_route", "_experts", "_logits", "_up", "_down", "_sum"):
            if name in vars(module):
                monkeypatch.setattr(module, name, Counted(name, getattr(module, name)))
    weights = make_weights(64, 128, rank=5, device=DEVICE)
    x = make_x(tokens, weights)
    choice, right = reference.route(x, weights.router), expected(x, weights, None)
    monkeypatch.setattr(torch.nn.functional, "linear", None)  # nothing by PyTorch
    found = sparse_ffn(x, weights, backend="triton")
    assert launched == (["_route", "_experts", "_sum"] if tokens == 1 else ["_logits", "_up", "_down", "_sum"])
    assert 0 < choice.float().mean() < 1
    assert relative_rms(found, right) < 3e-6


@combinations(
    "sizes tokens",
    [(16, 32, 16), (80, 256, 64), (208, 384, 128)],
    TOKENS[1:],
    chosen=[
        ((16, 32, 16), 1),
        ((80, 256, 64), 1),
        ((208, 384, 128), 1),
        ((16, 32, 16), 64),
        ((80, 256, 64), 17),
        ((208, 384, 128), 3),
        ((16, 32, 16), 130),
        ((80, 256, 64), 65),
        ((208, 384, 128), 65),
    ],
)
def test_odd_sizes(sizes, tokens):
    d_model, d_ff, expert_size = sizes
    weights = make_weights(d_model, d_ff, expert_size, bias=True, rank=3, device=DEVICE)
    x = make_x(tokens, weights)
    for active in (None, make_active(tokens, weights, "half")):
        found = sparse_ffn(x, weights, active, backend="triton")
        assert relative_rms(found, expected(x, weights, active)) < 3e-6


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(("d_model", "d_ff"), [(576, 1536), (2048, 8192), (4096, 11008), (3584, 18944)])
@pytest.mark.parametrize("tokens", TOKENS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_of_real_models(d_model, d_ff, tokens, dtype):
    for rank in (0, 32, triton_token.MAX_RANK):
        weights = make_weights(d_model, d_ff, rank=rank, dtype=dtype, device=DEVICE)
        x = make_x(tokens, weights)
        found = sparse_ffn(x, weights, backend="triton")
        assert relative_rms(found, expected(x, weights, None)) < TOLERANCE[dtype]
        assert torch.equal(found, sparse_ffn(x, weights, backend="triton"))


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize(("tokens", "gated"), [(1, False), (3, True), (70, True)])
def test_activations(act, tokens, gated):
    weights = make_weights(64, 128, gated=gated, act=act, device=DEVICE)
    x = make_x(tokens, weights)
    assert relative_rms(sparse_ffn(x, weights, backend="triton"), expected(x, weights, None)) < 3e-6


@pytest.mark.parametrize("tokens", [1, 3])
def test_inactive_experts_are_not_read(tokens):
    weights = make_weights(64, 256, bias=True, rank=5, device=DEVICE)
    x = make_x(tokens, weights)
    active = make_active(tokens, weights, "one")
    clean = sparse_ffn(x, weights, active, backend="triton")
    assert not active.any(0).all()
    found = sparse_ffn(x, *poisoned(weights, active), backend="triton")
    assert torch.equal(found, clean)
    assert clean.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="the interpreter runs one program after the other")
@pytest.mark.parametrize("tokens", TOKENS[1:])
def test_same_bits_every_time(tokens):
    weights = make_weights(64, 256, rank=5, device=DEVICE)
    x = make_x(tokens, weights)
    first = sparse_ffn(x, weights, backend="triton")
    assert all(torch.equal(first, sparse_ffn(x, weights, backend="triton")) for _ in range(3))


ROUTER, COMPRESS, EXPAND = "router.matrix.rows", "compensation.compress.rows", "compensation.expand.rows"


@pytest.mark.parametrize("other", [[ROUTER], [COMPRESS], [ROUTER, COMPRESS]])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_router_compensation_and_biases_of_another_dtype(tokens, other):
    weights = make_weights(64, 128, bias=True, rank=5, dtype=torch.float16, device=DEVICE)
    names = {*other, EXPAND, *(name for name in tensors_of(weights) if name.endswith("bias"))}
    mixed = changed(weights, {name: tensors_of(weights)[name].float() for name in names})
    x = make_x(tokens, weights)
    assert relative_rms(sparse_ffn(x, mixed, backend="triton"), expected(x, mixed, None)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_inputs_that_are_not_contiguous(tokens):
    weights = make_weights(64, 128, device=DEVICE)
    x = make_x(2 * tokens, weights)
    strided = x.view(tokens, 2, 64).transpose(0, 1)[1]
    wide = torch.cat([x, x], dim=-1)[:tokens, :64]
    for one in (strided, wide):
        found = sparse_ffn(one, weights, backend="triton")
        assert torch.equal(found, sparse_ffn(one.contiguous(), weights, backend="triton"))
    batched = x.view(2, tokens, 64)
    assert sparse_ffn(batched, weights, backend="triton").shape == batched.shape


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("down.matrix.rows", "transposed", "call lte.optimize_ for an FFN"),
        ("up.matrix.rows", torch.float16, "up.matrix.rows is torch.float16: convert one of them"),
        ("gate.matrix.rows", torch.float16, "gate.matrix.rows is torch.float16: convert one of them"),
        (ROUTER, "transposed", "call lte.optimize_ for an FFN"),
        (ROUTER, torch.float64, f"{ROUTER} is torch.float64"),
        (COMPRESS, "transposed", f"{COMPRESS} is not contiguous"),
        (EXPAND, "transposed", f"{EXPAND} is not contiguous"),
        (COMPRESS, torch.float64, f"{COMPRESS} is torch.float64"),
    ],
)
def test_refusals(name, how, message):
    weights = make_weights(64, 128, rank=3, device=DEVICE)
    tensor = tensors_of(weights)[name]
    weights = changed(weights, {name: tensor.T.contiguous().T if how == "transposed" else tensor.to(how)})
    with pytest.raises(ValueError, match=message):
        sparse_ffn(make_x(1, make_weights(64, 128, device=DEVICE)), weights, backend="triton")


@pytest.mark.parametrize(
    ("d_model", "d_ff", "expert_size", "message"), [(40, 96, 32, "multiples of 16"), (64, 96, 24, "neurons")]
)
def test_refused_shapes(d_model, d_ff, expert_size, message):
    weights = make_weights(d_model, d_ff, expert_size, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        sparse_ffn(make_x(1, weights), weights, backend="triton")


@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_a_rank_beyond_the_registers(tokens):
    weights = make_weights(64, 128, rank=triton_token.MAX_RANK + 1, device=DEVICE)
    x = make_x(tokens, weights)
    for active in (None, make_active(tokens, weights, "half")):
        found = sparse_ffn(x, weights, active, backend="triton")
        assert relative_rms(found, expected(x, weights, active)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_a_compensation_of_less_precision_than_the_input(tokens):
    weights = make_weights(64, 128, rank=16, device=DEVICE)
    half = {name: one.half() for name, one in weights.named_tensors() if name.startswith("compensation")}
    weights = changed(weights, half)
    x = 1e5 * make_x(tokens, weights)
    idle = torch.zeros(tokens, weights.num_experts, dtype=torch.bool, device=DEVICE)
    found = sparse_ffn(x, weights, idle, backend="triton")
    assert relative_rms(found, expected(x, weights, idle)) < TOLERANCE[torch.float32]


def test_refuses_a_dtype():
    weights = make_weights(64, 128, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="float64"):
        sparse_ffn(make_x(1, weights), weights, backend="triton")


@combinations("programs rows stages", [1, 7], [1, 4], [1, 3], chosen=[(1, 1, 1), (1, 4, 3), (7, 4, 1), (7, 1, 3)])
def test_any_tuning_of_one_token_gives_the_same(programs, rows, stages):
    weights = make_weights(64, 160, rank=5, device=DEVICE)
    x = make_x(1, weights)
    tuning = triton_token.Tuning(programs, rows, stages, warps=4, columns=32)
    found = triton_token.token_ffn(x, weights, None, tuning)
    assert relative_rms(found, expected(x, weights, None)) < 3e-6


@combinations(
    "expert_size cut",
    [16, 32, 128],
    [(16, 1, 1), (32, 2, 3), (64, 4, 8)],
    chosen=[(16, (16, 1, 1)), (128, (16, 1, 1)), (16, (32, 2, 3)), (32, (32, 2, 3)), (32, (64, 4, 8))],
)
def test_any_tuning_of_several_tokens_gives_the_same(expert_size, cut):
    up_neurons, down_experts, splits = cut
    weights = make_weights(80, 5 * expert_size, expert_size, bias=True, rank=20, device=DEVICE)
    tuning = triton_union.Tuning(
        up_neurons=up_neurons,
        up_width=32,
        slice_width=32,
        down_experts=down_experts,
        down_stages=2,
        splits=splits,
        router=triton_router.Tuning(tokens=16, experts=16, width=16, splits=splits, stages=2, warps=4),
    )
    x = make_x(9, weights)
    for active in (None, make_active(9, weights, "one"), make_active(9, weights, "one") & (x[:, :1] > 1)):
        found = triton_union.union_ffn(x, *poisoned(weights, active), tuning)
        assert relative_rms(found, expected(x, weights, active)) < 3e-6


@pytest.mark.parametrize("router_tokens", [0, 70])
@pytest.mark.parametrize(("block", "neurons"), [(1, 256), (4, 16)])
def test_any_tuning_of_many_tokens_gives_the_same(block, neurons, router_tokens):
    weights = make_weights(80, 160, bias=True, rank=5, device=DEVICE)
    x = make_x(70, weights)
    found = triton_masked.masked_ffn(
        x, weights, None, triton_masked.Tuning(block, neurons, router_tokens=router_tokens)
    )
    assert relative_rms(found, expected(x, weights, None)) < 3e-6


def test_tunings_fit_the_shared_memory(monkeypatch):
    device = torch.device(DEVICE)
    room = device_info(device).shared_memory
    for width, matrices, itemsize in itertools.product((576, 4096, 8192, 16384), (2, 3), (2, 4)):
        tuning = triton_token.Tuning.of(device, width, matrices, itemsize)
        assert tuning.stages == 1 or tuning.stages * matrices * tuning.rows * width * itemsize < room
    for tokens, expert_size, itemsize in itertools.product((2, 17, 64), (16, 32, 64, 128), (2, 4)):
        tuning = triton_union.Tuning.of(device, tokens, 4096, expert_size, itemsize)
        rows = tuning.down_experts * expert_size
        up = (2 * tuning.up_neurons + tokens) * tuning.up_width * itemsize
        down = rows * (tuning.slice_width + tokens) * itemsize
        assert tuning.up_stages == 1 or tuning.up_stages * up < room
        assert tuning.down_stages == 1 or tuning.down_stages * down < room
    few = dataclasses.replace(device_info(device), multiprocessors=28, shared_memory=99_000)
    monkeypatch.setattr(triton_union, "device_info", lambda _: few)
    assert triton_union.Tuning.of.__wrapped__(device, 64, 4096, 32, 4).splits == 1
    assert triton_union.Tuning.of.__wrapped__(device, 64, 4096, 32, 4, triton_token.MAX_RANK).splits == 4
    for tokens, itemsize in itertools.product((2, 17, 64, 200, 512), (2, 4)):
        tuning = triton_router.Tuning.of(device, tokens, 4096, itemsize)
        tile = (tuning.tokens + tuning.experts) * tuning.width * itemsize
        assert tuning.stages == 1 or tuning.stages * tile < room


@pytest.mark.parametrize("tokens", [1, 3])
def test_torch_compile_sees_one_call(tokens):
    weights = make_weights(64, 128, rank=5, device=DEVICE)
    x = make_x(tokens, weights)
    compiled = torch.compile(lambda x: sparse_ffn(x, weights, backend="triton") + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), sparse_ffn(x, weights, backend="triton") + 1)


@pytest.mark.parametrize("given", [False, True])
def test_opcheck(given):
    weights = make_weights(64, 128, bias=True, rank=5, device=DEVICE)
    x = make_x(3, weights)
    active = make_active(3, weights, "half") if given else None
    arguments = (x, list(weights.tensors), weights.router.threshold, weights.act, active, "triton")
    torch.library.opcheck(torch.ops.lte.sparse_ffn.default, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("tokens", [1, 5, 40, 200])
def test_in_a_cuda_graph_without_synchronising(tokens):
    weights = make_weights(576, 1536, rank=32, dtype=torch.bfloat16, device=DEVICE)
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
    for seed in (5, 6):  # other tokens want other experts
        x.copy_(make_x(tokens, weights, seed))
        graph.replay()
        assert torch.equal(y, sparse_ffn(x, weights, backend="triton"))
