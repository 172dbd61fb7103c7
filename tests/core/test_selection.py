import math

import pytest
import torch

from lte.core.selection import scale_experts, threshold, top_k


def test_threshold_is_strict_and_nan_is_inactive():
    found = threshold(torch.tensor([0.5, 0.5000001, 0.4, 1.0, math.nan]), 0.5)
    assert found.tolist() == [False, True, False, True, False]


def test_top_k_takes_the_highest_of_each_token():
    scores = torch.tensor([[[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]]])
    assert top_k(scores, 1).tolist() == [[[False, True, False], [True, False, False]]]
    assert top_k(scores, 2).tolist() == [[[False, True, True], [True, False, True]]]
    assert not top_k(scores, 0).any()
    assert top_k(scores, 3).all()


def test_top_k_takes_exactly_k_and_the_lower_index_of_equals():
    assert top_k(torch.full((1000,), 0.5), 3).nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("k", [-1, 4])
def test_top_k_out_of_range(k):
    with pytest.raises(ValueError, match="between 0 and the 3 experts"):
        top_k(torch.rand(2, 3), k)


def test_scale_experts_scales_contiguous_neurons_and_keeps_the_dtype():
    hidden = torch.arange(1.0, 7.0).expand(2, 2, 6)
    weight = torch.tensor([2.0, 0.0, -1.0]).expand(2, 2, 3)
    assert scale_experts(hidden, weight)[1, 1].tolist() == [2, 4, 0, 0, -5, -6]
    assert scale_experts(hidden.bfloat16(), weight).dtype == torch.bfloat16
    assert scale_experts(hidden, weight > 0)[0, 0].tolist() == [1, 2, 0, 0, 0, 0]
