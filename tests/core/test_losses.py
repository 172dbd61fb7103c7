import math

import pytest
import torch

from lte.core.losses import efficiency_loss, separability_loss

SCORES = [[[0.9, 0.1], [0.2, 0.4]], [[0.5, 0.7], [0.3, 0.8]]]  # 2 rows, 2 tokens, 2 experts
MASK = [[1, 1], [1, 0]]
COUNTED = [0.9, 0.1, 0.2, 0.4, 0.5, 0.7]
TAU = 0.45


def scores(**kwargs):
    return torch.tensor(SCORES, **kwargs)


def test_efficiency_is_the_mean_square():
    everything = [*COUNTED, 0.3, 0.8]
    assert efficiency_loss(scores()).item() == pytest.approx(sum(g * g for g in everything) / 8)
    assert efficiency_loss(scores(), torch.tensor(MASK)).item() == pytest.approx(sum(g * g for g in COUNTED) / 6)


def test_separability_is_the_mean_inverse_square_distance():
    found = separability_loss(scores(), TAU, 1e-6, torch.tensor(MASK)).item()
    assert found == pytest.approx(sum((g - TAU) ** -2 for g in COUNTED) / 6, rel=1e-4)


def test_masks_of_any_kind_that_broadcasts():
    expected = efficiency_loss(scores(), torch.tensor(MASK))
    for mask in (torch.tensor(MASK).bool(), torch.tensor(MASK).float(), torch.tensor(MASK).half()):
        assert torch.equal(efficiency_loss(scores(), mask), expected)
    row = torch.tensor([1, 0])
    assert torch.equal(efficiency_loss(scores(), row), efficiency_loss(scores()[:, :1]))


def test_nothing_counted_is_zero():
    assert efficiency_loss(scores(), torch.zeros(2, 2)).item() == 0
    assert separability_loss(scores(), TAU, 1e-6, torch.zeros(2, 2)).item() == 0


def test_what_padding_holds_does_not_matter():
    poisoned = scores()
    poisoned[1, 1] = math.nan
    mask = torch.tensor(MASK)
    assert torch.equal(efficiency_loss(poisoned, mask), efficiency_loss(scores(), mask))
    assert torch.equal(separability_loss(poisoned, TAU, 1e-6, mask), separability_loss(scores(), TAU, 1e-6, mask))


def test_fp32_in_whatever_precision_the_model_runs():
    half = scores(dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        efficiency, separability = efficiency_loss(half), separability_loss(half, TAU, 1e-6)
        in_fp32 = separability_loss(scores(), TAU, 1e-6)
    assert efficiency.dtype == separability.dtype == torch.float32
    assert torch.equal(in_fp32, separability_loss(scores(), TAU, 1e-6))
    assert torch.equal(efficiency, efficiency_loss(half.detach().float()))
    efficiency.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_gradients_are_those_of_the_formulas():
    g = scores(requires_grad=True)
    mask = torch.tensor(MASK)
    counted = mask.unsqueeze(-1)
    (efficiency,) = torch.autograd.grad(efficiency_loss(g, mask), g)
    torch.testing.assert_close(efficiency, 2 * g.detach() / 6 * counted)
    (separability,) = torch.autograd.grad(separability_loss(g, TAU, 1e-6, mask), g)
    torch.testing.assert_close(separability, -2 * (g.detach() - TAU) ** -3 / 6 * counted)


def test_floor_bounds_value_and_gradient():
    g = torch.tensor([[0.5, 0.5 + 1e-3, 0.9]], requires_grad=True)
    loss = separability_loss(g, tau=0.5, floor=0.01)
    assert loss.item() == pytest.approx((100 + 100 + 1 / 0.16) / 3)
    (gradient,) = torch.autograd.grad(loss, g)
    assert gradient[0, :2].tolist() == [0, 0]
    assert gradient[0, 2].item() == pytest.approx(-2 / 0.4**3 / 3, rel=1e-5)


@pytest.mark.parametrize("floor", [0, -1.0, math.nan])
def test_floor_must_be_positive(floor):
    with pytest.raises(ValueError, match="floor > 0"):
        separability_loss(scores(), 0.5, floor)


def test_layers_weigh_the_same_whatever_their_number_of_experts():
    narrow, wide = torch.full((2, 2, 1), 0.2), torch.full((2, 2, 9), 0.6)
    assert efficiency_loss([narrow, wide]).item() == pytest.approx((0.04 + 0.36) / 2)
    mask = torch.tensor(MASK)
    each = [separability_loss(one, 0.5, 1e-4, mask) for one in (scores(), narrow)]
    assert separability_loss((scores(), narrow), 0.5, 1e-4, mask).item() == pytest.approx(sum(each).item() / 2)


def test_no_layers_is_an_error():
    with pytest.raises(ValueError, match="record_scores"):
        efficiency_loss([])
