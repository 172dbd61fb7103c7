"""GLUE's metrics against numbers worked out by hand and against scikit-learn's and scipy's."""

import pytest
import torch

from lte.evaluation.class_metrics import of_classes, of_numbers


def test_two_classes_by_hand():
    """True positives 2, false positives 1, false negatives 1, true negatives 4."""
    true_B = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])
    predicted_B = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0])
    found = of_classes(predicted_B, true_B, 2)
    assert found == pytest.approx({"accuracy": 6 / 8, "f1": 4 / 6, "matthews": (2 * 4 - 1) / (3 * 3 * 5 * 5) ** 0.5})


@pytest.mark.parametrize("predicted", [0, 1])
def test_a_class_that_never_occurs(predicted):
    found = of_classes(torch.full((3,), predicted), torch.zeros(3, dtype=torch.long), 2)
    assert found == {"accuracy": 1.0 - predicted, "f1": 0.0, "matthews": 0.0}


def test_three_classes_have_no_f1():
    found = of_classes(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0]), 3)
    assert found.keys() == {"accuracy", "matthews"}


@pytest.mark.parametrize("classes", [2, 4])
def test_classes_as_scikit_learn(classes):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(classes)
    true_B, noise_B = torch.randint(classes, (2, 200), generator=generator)
    predicted_B = torch.where(torch.rand(200, generator=generator) < 0.6, true_B, noise_B)
    found = of_classes(predicted_B, true_B, classes)
    assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(true_B, predicted_B))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true_B, predicted_B))
    if classes == 2:
        assert found["f1"] == pytest.approx(metrics.f1_score(true_B, predicted_B))


def test_numbers_by_hand():
    """Rising together, but not on a line; then a tie, then no spread."""
    found = of_numbers(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(8 / (38 * 2) ** 0.5)
    assert of_numbers(torch.tensor([1.0, 1.0, 5.0]), torch.tensor([2.0, 2.0, 0.0]))["spearman"] == pytest.approx(-1)
    assert of_numbers(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])) == {"pearson": 0.0, "spearman": 0.0}


def test_numbers_as_scipy():
    stats = pytest.importorskip("scipy.stats")
    a_B = torch.randint(6, (100,), generator=torch.Generator().manual_seed(0)).float()  # with ties
    b_B = a_B + torch.randn(100, generator=torch.Generator().manual_seed(1)).round()
    found = of_numbers(a_B, b_B)
    assert found["pearson"] == pytest.approx(stats.pearsonr(a_B, b_B).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(a_B, b_B).statistic)
