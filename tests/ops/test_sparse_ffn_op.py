"""The operation's own checks, and the choice of a backend."""

import dataclasses
import logging

import pytest
import torch
from random_ffn import changed, make_active, make_weights, make_x, relative_rms
from torch._subclasses import FakeTensorMode

from lte.ops import reference
from lte.ops.sparse_ffn import sparse_ffn
from lte.ops.weights import TENSORS, Affine, FFNWeights, LowRank, Matrix, RouterWeights, unflatten


@pytest.mark.parametrize("gated", [False, True])
def test_reference_is_the_sum_over_active_experts(gated):
    weights = make_weights(16, 64, 16, gated=gated, bias=True)
    x = make_x(5, weights)
    active = make_active(5, weights, "half")
    expected = torch.zeros_like(x) + weights.down.bias

    def product(part, neuron, token):
        return part.matrix.rows[neuron] @ x[token] + part.bias[neuron]

    for token in range(5):
        for neuron in range(64):
            if active[token, neuron // 16]:
                up = product(weights.up, neuron, token)
                if gated:
                    up = torch.nn.functional.silu(product(weights.gate, neuron, token)) * up
                else:
                    up = torch.nn.functional.silu(up)
                expected[token] += up * weights.down.matrix.rows[neuron]
    assert relative_rms(sparse_ffn(x, weights, active, backend="reference"), expected) < 1e-6


def test_reference_adds_a_share_of_the_compensation_for_each_idle_expert():
    weights = FFNWeights(
        up=Affine(Matrix(torch.zeros(4, 2))),
        down=Affine(Matrix(torch.zeros(4, 2)), torch.tensor([10.0, 20.0])),
        router=RouterWeights(Matrix(torch.zeros(4, 2))),
        compensation=LowRank(
            Matrix(torch.tensor([[1.0, 2.0]])), torch.tensor([0.5]), Matrix(torch.tensor([[3.0], [-1.0]]))
        ),
    )
    x = torch.tensor([[1.0, 1.0], [0.0, 2.0], [2.0, 0.0]])
    active = torch.tensor([[True, False, False, False], [True] * 4, [False] * 4])
    expected = [[10 + 0.75 * 3.5 * 3, 20 - 0.75 * 3.5], [10.0, 20.0], [10 + 2.5 * 3, 20 - 2.5]]
    assert sparse_ffn(x, weights, active, backend="reference").tolist() == expected
    # without a choice given it is the router's: logits are the sums of x
    routed = dataclasses.replace(weights, router=RouterWeights(Matrix(torch.tensor([[1.0, 1.0]] * 4)), threshold=1.9))
    assert sparse_ffn(x[:1] / 2, routed).tolist() == [[10 + 2.0 * 3, 20 - 2.0]]
    assert sparse_ffn(x[:1], routed).tolist() == [[10.0, 20.0]]


def test_fake_tensors_are_not_read():
    weights = make_weights(16, 64, 16)
    with torch.no_grad(), FakeTensorMode() as mode:
        fake = changed(weights, {name: mode.from_tensor(one) for name, one in weights.named_tensors()})
        assert sparse_ffn(mode.from_tensor(make_x(3, weights)), fake).shape == (3, 16)


def test_router_decides_by_logit_and_threshold():
    weights = changed(make_weights(16, 64, 16), {}, threshold=0.3)
    x = make_x(50, weights)
    logits = x @ weights.router.matrix.rows.T + weights.router.bias
    assert torch.equal(reference.route(x, weights.router), logits > 0.3)


def test_leading_shape_and_no_tokens():
    weights = make_weights(16, 64, 16)
    x = make_x(6, weights)
    for backend in ("auto", "reference"):
        assert torch.equal(
            sparse_ffn(x.view(2, 3, 16), weights, backend=backend).view(6, 16), sparse_ffn(x, weights, backend=backend)
        )
        assert sparse_ffn(x[:0], weights, backend=backend).shape == (0, 16)


def test_reference_computes_gradients_and_the_others_say_they_do_not():
    weights = make_weights(16, 64, 16)
    x = make_x(3, weights).requires_grad_()
    with torch.enable_grad():
        for backend in ("auto", "reference"):
            (gradient,) = torch.autograd.grad(sparse_ffn(x, weights, backend=backend).sum(), x)
            assert gradient.abs().sum() > 0
        with pytest.raises(ValueError, match="computes no gradient"):
            sparse_ffn(x, weights, backend="cpu")


def test_gradients_reach_the_compensation():
    weights = make_weights(16, 64, 16, rank=3)
    learnt = [tensor.requires_grad_() for name, tensor in weights.named_tensors() if name.startswith("compensation")]
    x = make_x(3, weights)
    with torch.enable_grad():
        gradients = torch.autograd.grad(sparse_ffn(x, weights, make_active(3, weights, "half")).sum(), learnt)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        with pytest.raises(ValueError, match="computes no gradient"):
            sparse_ffn(x, weights, backend="cpu")


@pytest.mark.parametrize(
    ("x", "active", "backend", "message"),
    [
        (torch.zeros(2, 8), None, "auto", "takes .*16"),
        (torch.zeros(2, 16, dtype=torch.long), None, "auto", "floating point"),
        (torch.zeros(2, 16, device="meta"), None, "auto", "move one of them"),
        (torch.zeros(2, 16), torch.ones(2, 4), "auto", "torch.bool"),
        (torch.zeros(2, 16), torch.ones(3, 4, dtype=torch.bool), "auto", "torch.bool"),
        (torch.zeros(2, 16), None, "cuda", "one of auto"),
    ],
)
def test_arguments_that_do_not_fit(x, active, backend, message):
    with pytest.raises(ValueError, match=message):
        sparse_ffn(x, make_weights(16, 64, 16), active, backend=backend)


COMPRESS, COMPRESS_BIAS, EXPAND = "compensation.compress.rows", "compensation.bias", "compensation.expand.rows"
LOW_RANK = {COMPRESS: torch.zeros(3, 16), COMPRESS_BIAS: torch.zeros(3), EXPAND: torch.zeros(16, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down.matrix.rows": torch.zeros(16, 64)}, r"down is \(16, 64\), but beside up \(64, 16\) it is \(64, 16\)"),
        ({"gate.matrix.rows": torch.zeros(16, 64)}, "gate is"),
        ({"router.matrix.rows": torch.zeros(3, 16)}, "multiple of E"),
        ({"router.matrix.rows": torch.zeros(0, 16)}, "multiple of E"),
        ({"router.matrix.rows": torch.zeros(4, 8)}, "router is"),
        ({"router.bias": torch.zeros(5)}, "router.bias is"),
        ({"up.bias": torch.zeros(16)}, "up.bias is"),
        ({"gate.bias": torch.zeros(16)}, "gate.bias is"),
        ({"down.bias": torch.zeros(64)}, "down.bias is"),
        ({**LOW_RANK, COMPRESS: torch.zeros(3, 8)}, r"compress is \(3, 8\), but beside .* \(3, 16\)"),
        ({**LOW_RANK, COMPRESS: torch.zeros(16)}, r"compress is \(16,\)"),
        ({**LOW_RANK, COMPRESS: torch.zeros(0, 16)}, r"compress is \(0, 16\)"),
        ({**LOW_RANK, COMPRESS_BIAS: torch.zeros(16)}, r"compensation.bias is \(16,\), but beside .* \(3,\)"),
        ({**LOW_RANK, EXPAND: torch.zeros(3, 16)}, r"expand is \(3, 16\), but beside .* \(16, 3\)"),
    ],
)
def test_weights_that_do_not_belong_together(change, message):
    with pytest.raises(ValueError, match=message):
        changed(make_weights(16, 64, 16, bias=True), change)


def test_an_activation_that_no_backend_knows():
    with pytest.raises(ValueError, match="act is 'tanh', but it is one of silu"):
        make_weights(16, 64, 16, act="tanh")


@pytest.mark.parametrize("kind", [{"gated": False}, {"bias": True}, {"rank": 3}, {"bias": True, "rank": 3}], ids=str)
def test_tensors_are_listed_in_one_order_and_put_back(kind):
    weights = make_weights(16, 64, 16, act="relu", **kind)
    again = unflatten(weights.tensors, 0.5, "relu")
    assert all(one is other for one, other in zip(again.tensors, weights.tensors, strict=True))
    assert (again.gate is None) == (weights.gate is None)
    assert (again.compensation is None) == (weights.compensation is None)
    assert (again.act, again.router.threshold) == ("relu", 0.5)
    for name, tensor in zip(TENSORS, weights.tensors, strict=True):
        part = weights
        for attribute in name.split("."):
            part = part and getattr(part, attribute)
        assert part is tensor, name


def test_auto_says_once_why_it_falls_back(caplog):
    weights = make_weights(16, 64, 16, dtype=torch.float64)  # which no compiled backend takes
    x = make_x(2, weights)
    with caplog.at_level(logging.WARNING, "lte"):
        first = sparse_ffn(x, weights)
        sparse_ffn(x, weights)
    assert torch.equal(first, reference.sparse_ffn(x, weights))
    assert len(caplog.records) <= 1
