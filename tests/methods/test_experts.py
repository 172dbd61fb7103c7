"""Finding experts in several FFNs: which are grouped at once, and that it makes no difference."""

from types import SimpleNamespace

import pytest
import torch

from lte.core.grouping import balanced_kmeans, coactivation_gram, group_by_gram
from lte.methods import experts
from lte.methods.experts import _alike, group_neurons


def ffn(d_ff: int, device: str = "cpu") -> SimpleNamespace:
    weight = torch.randn(d_ff, 24, generator=torch.Generator().manual_seed(d_ff)).to(device)
    return SimpleNamespace(d_ff=d_ff, feature_rows=lambda: weight)


def test_neighbours_of_one_width_and_device_are_grouped_at_once_as_far_as_memory_allows(monkeypatch) -> None:
    sites = [ffn(64), ffn(64), *(ffn(64, "meta") for _ in range(5)), ffn(32, "meta"), ffn(64, "meta")]
    assert list(_alike(sites)) == [[0], [1], [2, 3, 4, 5, 6], [7], [8]]
    monkeypatch.setattr(experts, "_GRAMS", 2 * 4 * 64**2)
    assert list(_alike(sites)) == [[0], [1], [2, 3], [4, 5], [6], [7], [8]]
    monkeypatch.setattr(experts, "_GRAMS", 1)
    assert list(_alike(sites)) == [[i] for i in range(9)]


@pytest.mark.parametrize("grouping", ["kmeans", "coactivation"])
def test_it_makes_no_difference(monkeypatch, grouping) -> None:
    sites = [ffn(64), ffn(64), ffn(96)]
    activations = [
        torch.randn(50, site.d_ff, generator=torch.Generator().manual_seed(i)) for i, site in enumerate(sites)
    ]
    monkeypatch.setattr(experts, "_alike", lambda _sites: [[0, 1], [2]])
    together = group_neurons(sites, grouping, 16, activations, seed=3)
    for i, (site, labels_F) in enumerate(zip(sites, together, strict=True)):
        if grouping == "kmeans":
            alone_F = balanced_kmeans(site.feature_rows(), site.d_ff // 16, 3 + i)
        else:
            alone_F = group_by_gram(coactivation_gram(activations[i])[None], site.d_ff // 16, [3 + i])[0]
        assert labels_F.tolist() == alone_F.tolist()


def test_an_expert_size_that_does_not_fit_is_refused_before_anything_is_grouped() -> None:
    with pytest.raises(ValueError, match="expert_size 64 does not divide d_ff 96"):
        next(iter(group_neurons([ffn(64), ffn(96)], "kmeans", 64, [], seed=0)))
