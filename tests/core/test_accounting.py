import math

import pytest
import torch

from lte.core import accounting
from lte.core.accounting import G, Shape, cost, count_active

# LLaMA-7B: 32 layers, 4096 wide, d_ff 11008, 344 experts
LLAMA_7B = Shape(
    ffn_weights=(3 * 4096 * 11008,) * 32,
    router_weights=(344 * 4096,) * 32,
    attention_weights=32 * 4 * 4096**2,
    head_weights=32000 * 4096,
    embedding_weights=32000 * 4096,
)


def test_dense_llama_7b_is_the_papers():
    dense = cost(LLAMA_7B)
    assert (dense.ffn_gflops, dense.attention_gflops, dense.router_gflops) == (8.0625, 4.0, 0.0)
    assert dense.gflops == 12.0625
    assert dense.head_gflops == 2 * 32000 * 4096 / G
    assert dense.weight_bytes == 12.0625 * G  # bf16: two bytes, and two FLOPs, a weight


@pytest.mark.parametrize(("sparsity", "gflops"), [(0.689, 6.59), (0.84, 5.38), (0.93, 4.65)])
def test_sparse_llama_7b_is_the_papers(sparsity, gflops):
    assert cost(LLAMA_7B, sparsity).gflops == pytest.approx(gflops, abs=0.01)


def test_router_is_charged_when_something_is_skipped():
    router = 2 * 32 * 344 * 4096 / G
    assert cost(LLAMA_7B, 0.1).router_gflops == router
    assert cost(LLAMA_7B, 0.0, router=True).gflops == 12.0625 + router
    assert cost(LLAMA_7B, 0.5, router=False).gflops == 8.0625 / 2 + 4


def test_a_sparsity_for_each_layer():
    shape = Shape((G, 2 * G), (0, 0), 0)
    assert cost(shape, [0.5, 0.25]).ffn_gflops == 2 * (0.5 + 1.5)
    assert cost(shape, (0.5, 0.25)).ffn_gflops == cost(shape, torch.tensor([0.5, 0.25])).ffn_gflops


def test_what_a_choice_is_made_by_is_charged_in_full():
    """As for CATS: of three matrices the first is multiplied for all neurons, two for the active ones."""
    shape = Shape((3 * G,), (0,), 0, selection_weights=(G,))
    assert [cost(shape, s).ffn_gflops for s in (0, 0.5, 1)] == [6, 4, 2]
    assert cost(shape, 0.5).weight_bytes == 2 * 2 * G


def test_head_and_embedding_are_apart():
    bigger = Shape(LLAMA_7B.ffn_weights, LLAMA_7B.router_weights, LLAMA_7B.attention_weights, 1, 10**9)
    assert cost(bigger).weight_bytes == cost(LLAMA_7B).weight_bytes
    assert cost(bigger, bytes_per_weight=4).embedding_bytes == 4 * 10**9
    assert cost(bigger).head_bytes == 2


@pytest.mark.parametrize("sparsity", [-0.01, 1.01, math.nan, [0.5] * 31 + [2]])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match="fraction between 0"):
        cost(LLAMA_7B, sparsity)


def test_sparsities_for_other_layers():
    with pytest.raises(ValueError, match="2 sparsities for 32 layers"):
        cost(LLAMA_7B, [0.1, 0.2])


def test_count_active_leaves_padding_out():
    active = torch.tensor([[[1, 1, 0], [0, 1, 0]], [[1, 1, 1], [0, 0, 0]]]).bool()  # layers, tokens, experts
    assert [n.tolist() for n in count_active(active)] == [[3, 3], 6]
    assert [n.tolist() for n in count_active(active, torch.tensor([0, 1]))] == [[1, 0], 3]
    assert [n.tolist() for n in count_active(active, torch.zeros(2))] == [[0, 0], 0]
    assert count_active(active)[0].dtype == torch.int64


def test_count_active_in_pieces_is_the_same(monkeypatch):
    active = torch.rand(3, 4, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5  # layers, rows, tokens, experts
    mask = torch.arange(20).reshape(4, 5) % 3
    whole = [count_active(active), count_active(active, mask)]
    assert whole[0][0].tolist() == [layer.sum().item() for layer in active]
    monkeypatch.setattr(accounting, "COUNTED_AT_ONCE", 3 * 7 * 6)  # twenty tokens by sixes
    for (active_L, total), (again_L, total_again) in zip(
        whole, [count_active(active), count_active(active, mask)], strict=True
    ):
        assert torch.equal(active_L, again_L)
        assert torch.equal(total, total_again)
