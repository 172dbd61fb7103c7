import copy

import pytest
import torch

from lte.modules.router import Router


def router(bias=0.0):
    made = Router(16, 5)
    made.reset(bias, torch.Generator().manual_seed(0))
    return made


def test_scores_are_a_sigmoid_of_a_linear_map():
    made, x = router(bias=0.3), torch.randn(2, 3, 16)
    made.temperature.fill_(2.0)
    expected = torch.sigmoid(2 * (x @ made.weight.T + 0.3))
    torch.testing.assert_close(made(x), expected)


def test_scores_are_fp32_and_as_exact_as_their_weights_allow():
    x = torch.randn(7, 16)
    half, x_half = router().bfloat16(), x.bfloat16()
    exact = torch.sigmoid(x_half.float() @ half.weight.float().T)
    assert half(x_half).dtype == torch.float32
    torch.testing.assert_close(half(x_half), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(half(x_half), half.float()(x_half))
        assert torch.equal(router()(x), router().double().float()(x))


def test_folding_the_temperature_keeps_the_scores():
    made, x = router(bias=-0.2), torch.randn(50, 16)
    made.temperature.fill_(7.5)
    before = made(x)
    made.fold_temperature()
    assert made.temperature.item() == 1
    torch.testing.assert_close(made(x), before)
    assert (made.bias == -0.2 * 7.5).all()


def test_reset_is_seeded_and_bounded_like_a_linear_layer():
    first, again, other = router(), router(), copy.deepcopy(router())
    other.reset(generator=torch.Generator().manual_seed(1))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert first.weight.abs().max() <= 16**-0.5
    assert first.weight.abs().max() > 0.8 * 16**-0.5
    first.temperature.fill_(3.0)
    first.reset(bias=1.0)
    assert (first.bias == 1).all()
    assert first.temperature == 1


def test_gradients_reach_weight_and_bias_but_not_the_temperature():
    made = router()
    made(torch.randn(4, 16)).sum().backward()
    assert made.weight.grad is not None
    assert made.bias.grad is not None
    assert {name for name, _ in made.named_parameters()} == {"weight", "bias"}
    assert "temperature" in made.state_dict()


@pytest.mark.parametrize("device", ["meta"])
def test_runs_on_meta(device):
    assert Router(16, 5, torch.device(device))(torch.empty(2, 3, 16, device=device)).shape == (2, 3, 5)
