import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lte.modules.router import Router
from lte.modules.sparse_ffn import Roles, SparseActivation, SparseFFN

D, F_, E, N = 12, 24, 6, 4
TAU = 0.5


class DenseFFN(nn.Module):
    def __init__(self, kind):
        super().__init__()
        width = 2 * F_ if kind == "fused" else F_
        self.up = nn.Linear(D, width)
        self.down = nn.Linear(F_, D)
        self.act = nn.SiLU()
        if kind == "gated":
            self.gate = nn.Linear(D, F_)


def sparse_ffn(kind="gated", seed=0):
    torch.manual_seed(seed)
    dense = DenseFFN(kind)
    router = Router(D, E)
    router.reset()
    router.weight.data.mul_(5)
    roles = Roles("up", "down", "act", "gate" if kind == "gated" else None, fused_gate_up=kind == "fused")
    return SparseFFN(dense, roles, router, TAU)


def expert_output(ffn, x, expert):
    """E_i(x) of one token, written out neuron by neuron; without the bias of the down projection."""
    total = torch.zeros(D)
    for n in range(expert * N, (expert + 1) * N):
        up, bias = ffn.up.weight, ffn.up.bias
        if ffn.roles.fused_gate_up:
            hidden = F.silu(up[n] @ x + bias[n]) * (up[F_ + n] @ x + bias[F_ + n])
        elif ffn.roles.gate:
            hidden = F.silu(ffn.gate.weight[n] @ x + ffn.gate.bias[n]) * (up[n] @ x + bias[n])
        else:
            hidden = F.silu(up[n] @ x + bias[n])
        total = total + hidden * ffn.down.weight[:, n]
    return total


def literal(ffn, x_BTD, weigh):
    rows = []
    for x in x_BTD.flatten(0, 1):
        scores = torch.sigmoid(ffn.router.weight @ x + ffn.router.bias)
        rows.append(ffn.down.bias + sum(weigh(scores[e]) * expert_output(ffn, x, e) for e in range(E)))
    return torch.stack(rows).view(*x_BTD.shape[:2], D)


@pytest.mark.parametrize("kind", ["gated", "plain", "fused"])
def test_modes_are_the_papers_sums_over_experts(kind):
    ffn, x = sparse_ffn(kind), torch.randn(2, 3, D)
    scores = ffn.router(x)
    assert (scores > TAU).any()
    assert (scores <= TAU).any()
    torch.testing.assert_close(ffn(x), literal(ffn, x, lambda score: 1.0))
    ffn.set_mode("soft")
    torch.testing.assert_close(ffn(x), literal(ffn, x, lambda score: score))
    ffn.set_mode("hard")
    torch.testing.assert_close(ffn(x), literal(ffn, x, lambda score: float(score > TAU)))


def test_gradients_are_those_of_the_sums():
    x = torch.randn(2, 3, D)
    for mode, weigh in (("soft", lambda score: score), ("hard", lambda score: float(score > TAU))):
        ffn = sparse_ffn()
        ffn.set_mode(mode)
        parameters = [ffn.up.weight, ffn.down.weight, ffn.gate.bias]
        parameters += [ffn.router.weight] if mode == "soft" else []
        found = torch.autograd.grad(ffn(x).square().sum(), parameters)
        expected = torch.autograd.grad(literal(ffn, x, weigh).square().sum(), parameters)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_change_of_tau_changes_hard_selection():
    ffn, x = sparse_ffn(), torch.randn(2, 3, D)
    ffn.set_mode("hard")
    ffn.tau = 1.0
    assert torch.equal(ffn(x), ffn.down.bias.expand(2, 3, D))
    ffn.tau = 0.0
    everything = ffn(x)
    ffn.set_mode("dense")
    torch.testing.assert_close(ffn(x), everything)


def test_bf16_model_and_autocast_keep_the_output_dtype():
    x = torch.randn(2, 3, D)
    for mode in ("dense", "soft", "hard"):
        ffn = sparse_ffn()
        ffn.set_mode(mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ffn(x).dtype == torch.bfloat16
        assert ffn.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_the_router_does_not_run_in_mode_dense():
    ffn = sparse_ffn()
    ffn.router.weight.data.fill_(torch.nan)
    assert ffn(torch.randn(2, 3, D)).isfinite().all()


def test_unknown_mode():
    with pytest.raises(ValueError, match="dense, soft, hard"):
        sparse_ffn().set_mode("sparse")


def test_dropout_kept_as_a_number_acts_in_training_only():
    dense = DenseFFN("plain")
    dense.dropout = 1.0
    ffn = SparseFFN(dense, Roles("up", "down", "act", output_dropout="dropout"), Router(D, E), TAU)
    assert ffn.train()(torch.randn(2, D)).eq(0).all()
    assert ffn.eval()(torch.randn(2, D)).ne(0).all()


def test_activation_needs_its_layer():
    up = nn.Linear(D, F_)
    router = Router(D, E)
    router.reset()
    place = SparseActivation(nn.ReLU(), up, nn.Linear(F_, D), router, TAU)
    x = torch.randn(3, D)
    torch.testing.assert_close(place(up(x)), F.relu(up.forward(x)))
    with pytest.raises(RuntimeError, match="did not see"):
        place(torch.randn(3, F_))


def test_activation_weighs_like_the_ffn():
    torch.manual_seed(0)
    ffn, x = sparse_ffn("plain"), torch.randn(2, 3, D)
    place = SparseActivation(ffn.act, ffn.up, ffn.down, ffn.router, TAU)
    for mode in ("dense", "soft", "hard"):
        ffn.set_mode(mode)
        place.set_mode(mode)
        assert torch.equal(ffn.down(place(ffn.up(x))), ffn(x))
