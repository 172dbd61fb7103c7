"""GLUE's metrics: accuracy, F1 and Matthews correlation of classes, Pearson and Spearman correlation of numbers."""

import torch
from torch import Tensor


def of_classes(predicted_B: Tensor, true_B: Tensor, num_classes: int) -> dict[str, float]:
    """Return accuracy, Matthews correlation, and with two classes F1 of the second one.

    A correlation or F1 is 0 if it is not defined because a class never occurs.

    Args:
        predicted_B, true_B: classes ``[B]``, from 0.
    """
    counts_CC = torch.zeros(num_classes, num_classes, dtype=torch.double)  # true, predicted
    counts_CC.index_put_((true_B.cpu(), predicted_B.cpu()), torch.ones(len(true_B)).double(), accumulate=True)
    total, right = counts_CC.sum(), counts_CC.trace()
    true_C, predicted_C = counts_CC.sum(1), counts_CC.sum(0)
    spread = (total**2 - true_C @ true_C) * (total**2 - predicted_C @ predicted_C)
    matthews = (right * total - true_C @ predicted_C) / spread.sqrt() if spread > 0 else torch.zeros(())
    found = {"accuracy": (right / total).item(), "matthews": matthews.item()}
    if num_classes == 2:
        either = true_C[1] + predicted_C[1]
        found["f1"] = (2 * counts_CC[1, 1] / either).item() if either > 0 else 0.0
    return found


def of_numbers(predicted_B: Tensor, true_B: Tensor) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation. A correlation that is not defined (no spread) is 0."""
    predicted_B, true_B = predicted_B.double(), true_B.double()
    return {
        "pearson": _correlation(predicted_B, true_B),
        "spearman": _correlation(_ranks(predicted_B), _ranks(true_B)),
    }


def _correlation(a_B: Tensor, b_B: Tensor) -> float:
    a_B, b_B = a_B - a_B.mean(), b_B - b_B.mean()
    spread = a_B.norm() * b_B.norm()
    return (a_B @ b_B / spread).item() if spread > 0 else 0.0


def _ranks(values_B: Tensor) -> Tensor:
    """Return ranks from 0. Equal values have the mean of their ranks."""
    _, place_B, count_U = values_B.unique(return_inverse=True, return_counts=True)
    last_U = count_U.cumsum(0) - 1
    return (last_U - (count_U - 1) / 2).double()[place_B]
