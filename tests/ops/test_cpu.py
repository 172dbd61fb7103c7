"""The CPU backend: the definition's results, nothing of an inactive expert read, the same bits every time."""

from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest
import torch
from random_ffn import changed, make_active, make_weights, make_x, quantised, relative_rms, tensors_of

import lte.ops.sparse_ffn as ops
from lte.ops import reference
from lte.ops.weights import Activation, FFNWeights

cpu = pytest.importorskip("lte.ops.cpu")

# What rounding the result leaves: all else is fp32, whatever the dtypes
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
DTYPES = list(TOLERANCE)
NEURONS = {"up.matrix.rows", "gate.matrix.rows", "down.matrix.rows", "up.bias", "gate.bias"}  # a row a neuron
SIZES = [(48, 96, 16), (80, 256, 128), (576, 288, 32)]


def in_fp32(weights: FFNWeights) -> FFNWeights:
    floats = {name: tensor.float() for name, tensor in weights.named_tensors() if tensor.is_floating_point()}
    return changed(weights, floats)


def error(y_TD, x_TD, weights, active_TE=None) -> float:
    assert y_TD.dtype == x_TD.dtype
    assert y_TD.shape == x_TD.shape
    return relative_rms(y_TD, reference.sparse_ffn(x_TD.float(), in_fp32(weights), active_TE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("d_model", "d_ff", "expert_size"), SIZES)
def test_equals_the_reference(d_model, d_ff, expert_size, gated, bias, dtype):
    weights = make_weights(d_model, d_ff, expert_size, gated=gated, bias=bias, dtype=dtype)
    for tokens in (1, 3, 17, 130):
        x_TD = make_x(tokens, weights)
        assert error(cpu.sparse_ffn(x_TD, weights), x_TD, weights) < TOLERANCE[dtype]
        for share in ("none", "one", "half", "all"):
            active_TE = make_active(tokens, weights, share)
            assert error(cpu.sparse_ffn(x_TD, weights, active_TE), x_TD, weights, active_TE) < TOLERANCE[dtype]


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("options", [{}, {"bias": True, "rank": 3}, {"gated": False, "act": "relu", "expert_size": 16}])
def test_quantised_experts_equal_the_reference(to, options):
    weights = quantised(make_weights(64, 128, **options), to)
    for tokens in (1, 2, 7, 24, 70):
        x_TD = make_x(tokens, weights)
        for share in ("router", "none", "one", "half", "all"):
            active_TE = None if share == "router" else make_active(tokens, weights, share)
            assert error(cpu.sparse_ffn(x_TD, weights, active_TE), x_TD, weights, active_TE) < 2e-6


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_scales_of_inactive_experts_are_not_read(to, tokens):
    weights = quantised(make_weights(), to)
    active_TE = torch.tensor([True, False, False, True]).repeat(tokens, 1)
    names = [f"{part}.matrix.scales" for part in ("up", "gate", "down")]
    poisoned = changed(weights, {name: tensors_of(weights)[name].clone() for name in names})
    for name in names:
        scales = tensors_of(poisoned)[name]
        if scales.shape[0] == 128:  # int8, a scale for each neuron
            scales[32:96] = float("nan")
        elif to == "int4":
            scales[1:3] = float("nan")
    x_TD = make_x(tokens, weights)
    y_TD = cpu.sparse_ffn(x_TD, poisoned, active_TE)
    assert y_TD.isfinite().all()
    assert y_TD.equal(cpu.sparse_ffn(x_TD, weights, active_TE))
    assert y_TD.equal(cpu.sparse_ffn(x_TD, weights, active_TE))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantised_experts_with_scales_of_16_bits(to, dtype):
    for router in (False, True):
        weights = quantised(make_weights(576, 288, dtype=dtype), to, router)
        for tokens in (1, 6):
            x_TD = make_x(tokens, weights)
            assert error(cpu.sparse_ffn(x_TD, weights), x_TD, weights) < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 16, 64])
@pytest.mark.parametrize(("d_model", "d_ff", "expert_size"), [*SIZES, (52, 96, 16)])
def test_compensation(d_model, d_ff, expert_size, rank, bias, dtype):
    weights = make_weights(d_model, d_ff, expert_size, bias=bias, rank=rank, dtype=dtype)
    for tokens in (1, 3, 17, 70):
        x_TD = make_x(tokens, weights)
        for share in ("router", "none", "one", "half", "all"):
            active_TE = None if share == "router" else make_active(tokens, weights, share)
            y_TD = cpu.sparse_ffn(x_TD, weights, active_TE)
            assert error(y_TD, x_TD, weights, active_TE) < TOLERANCE[dtype]
            if share == "half":
                assert error(y_TD, x_TD, weights.without_compensation(), active_TE) > 0.05


@pytest.mark.parametrize("act", get_args(Activation))
@pytest.mark.parametrize("gated", [False, True])
def test_activations(act, gated):
    weights = make_weights(gated=gated, bias=True, act=act)
    # far from zero too, where an exponential overflows
    x_TD = make_x(40, weights) * torch.logspace(-2, 3, 40)[:, None]
    y_TD = cpu.sparse_ffn(x_TD, weights)
    for y_D, x_D in zip(y_TD, x_TD, strict=True):
        assert error(y_D[None], x_D[None], weights) < 3e-6


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize(("dtype", "router_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_dtypes_may_differ(x_dtype, dtype, router_dtype):
    weights = make_weights(bias=True, rank=5, dtype=dtype)
    names = ("router.matrix.rows", "compensation.bias", "compensation.expand.rows")
    mixed = {name: tensors_of(weights)[name].to(router_dtype) for name in names}
    weights = changed(weights, {**mixed, "up.bias": make_weights(bias=True).up.bias}, threshold=0.25)
    x_TD = make_x(5, weights).to(x_dtype)
    assert error(cpu.sparse_ffn(x_TD, weights), x_TD, weights) < TOLERANCE[x_dtype]


@pytest.mark.parametrize("tokens", [1, 6, 70])
@pytest.mark.parametrize("gated", [False, True])
def test_inactive_experts_are_not_read(gated, tokens):
    weights = make_weights(gated=gated, bias=True)
    active_TE = torch.tensor([True, False, False, True]).repeat(tokens, 1)
    active_TE[1:, 3] = False
    poisoned = changed(
        weights, {name: tensors_of(weights)[name].clone() for name in NEURONS & tensors_of(weights).keys()}
    )
    for name in NEURONS & tensors_of(weights).keys():
        tensors_of(poisoned)[name][32:96] = float("nan")
    x_TD = make_x(tokens, weights)
    y_TD = cpu.sparse_ffn(x_TD, poisoned, active_TE)
    assert y_TD.isfinite().all()
    assert y_TD.equal(cpu.sparse_ffn(x_TD, weights, active_TE))


def test_nan_and_infinity_pass_through():
    weights = make_weights(dtype=torch.bfloat16)
    x_TD = make_x(3, weights)
    x_TD[0, 0], x_TD[1, 0] = float("nan"), float("inf")
    y_TD = cpu.sparse_ffn(x_TD, weights, make_active(3, weights, "all"))
    assert not y_TD[:2].isfinite().any()
    assert y_TD[2].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 9])
def test_every_call_gives_the_same_bits(tokens):
    weights = make_weights(576, 1536, rank=5, dtype=torch.bfloat16)
    x_TD = make_x(tokens, weights).float()
    first = cpu.sparse_ffn(x_TD, weights)
    assert all(cpu.sparse_ffn(x_TD, weights).equal(first) for _ in range(20))


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_any_number_of_threads(threads):
    weights = make_weights(bias=True, rank=5)
    x_TD = make_x(6, weights)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for share in ("none", "one", "half"):
            active_TE = make_active(6, weights, share)
            assert error(cpu.sparse_ffn(x_TD, weights, active_TE), x_TD, weights, active_TE) < 2e-6
    finally:
        torch.set_num_threads(before)


def call_at_once(weights: FFNWeights) -> None:
    """From several Python threads, each with its own input."""
    inputs = [make_x(2, weights, seed) for seed in range(8)]
    expected = [cpu.sparse_ffn(x_TD, weights) for x_TD in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda x_TD: cpu.sparse_ffn(x_TD, weights), inputs)
            assert all(y.equal(e) for y, e in zip(found, expected, strict=True))


def test_calls_from_several_threads_at_once():
    call_at_once(make_weights(576, 288, rank=16))


@pytest.mark.slow
def test_without_openmp(monkeypatch):
    weights = make_weights(bias=True, rank=5)
    x_TD = make_x(6, weights)
    choices = [None, make_active(6, weights, "half")]
    with_openmp = [cpu.sparse_ffn(x_TD, weights, active_TE) for active_TE in choices]
    monkeypatch.setattr(cpu, "openmp", lambda: None)
    for active_TE, expected in zip(choices, with_openmp, strict=True):
        assert cpu.sparse_ffn(x_TD, weights, active_TE).equal(expected)
    call_at_once(weights)


def test_strided_x_and_active():
    weights = make_weights()
    x_TD, active_TE = make_x(70, weights), make_active(70, weights, "half")
    y_TD = cpu.sparse_ffn(x_TD.T.contiguous().T, weights, active_TE.T.contiguous().T)
    assert y_TD.equal(cpu.sparse_ffn(x_TD, weights, active_TE))
    assert ops.sparse_ffn(x_TD.T.contiguous().T, weights, backend="cpu").equal(cpu.sparse_ffn(x_TD, weights))


def test_refusals():
    weights = make_weights(rank=3)
    x = make_x(1, weights)
    assert cpu.refuses(x, weights) is None

    def refusal(name="up.bias", tensor=None, x=x):
        return cpu.refuses(x, changed(weights, {name: tensor}))

    def transposed(name):
        return name, tensors_of(weights)[name].T.contiguous().T

    assert refusal(x=x.double()) == "x is torch.float64, but the CPU kernels take float32, bfloat16 and float16"
    for name in ("router.matrix.rows", "compensation.expand.rows"):
        assert f"{name} is torch.float64" in refusal(name, tensors_of(weights)[name].double())
    for name in ("up.matrix.rows", "down.matrix.rows", "compensation.compress.rows"):
        assert f"{name} is not contiguous: call lte.optimize_" in refusal(*transposed(name))
    assert "differ in dtype" in refusal("gate.matrix.rows", weights.gate.matrix.rows.bfloat16())
    two_each = changed(weights, {"router.matrix.rows": torch.zeros(64, 64), "router.bias": None})
    assert "experts have 2 neurons" in cpu.refuses(x, two_each)
    assert refusal(x=x.to("meta")) == "x is on meta"
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run here: down\.matrix\.rows is not contiguous"):
        ops.sparse_ffn(x, changed(weights, dict([transposed("down.matrix.rows")])), backend="cpu")


def test_by_name():
    weights = make_weights(bias=True)
    x = make_x(6, weights).view(2, 3, -1)
    y = ops.sparse_ffn(x, weights, backend="cpu")
    assert y.shape == x.shape
    assert error(y.flatten(0, 1), x.flatten(0, 1), weights) < 2e-6
    assert ops.sparse_ffn(x[:0], weights, backend="cpu").shape == (0, 3, 64)


def test_auto_takes_it_for_one_token():
    weights = make_weights(576, 1536, dtype=torch.bfloat16)
    assert ops.choose(make_x(1, weights), weights, "auto") == "cpu"
    assert ops.choose(make_x(512, weights), weights, "auto") == "reference"


def test_compiles_into_a_graph():
    weights = make_weights(bias=True, rank=3)
    x = make_x(3, weights)
    function = torch.compile(lambda x: 2 * ops.sparse_ffn(x, weights, backend="cpu"), fullgraph=True, backend="eager")
    assert function(x).equal(2 * ops.sparse_ffn(x, weights, backend="cpu"))
    assert error(function(x) / 2, x, weights) < 2e-6


def test_is_a_proper_operator():
    weights = make_weights(bias=True, rank=3)
    x = make_x(3, weights)
    arguments = (x, list(weights.tensors), weights.router.threshold, weights.act, None, "cpu")
    torch.library.opcheck(torch.ops.lte.sparse_ffn.default, arguments)
