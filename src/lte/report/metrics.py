"""The measures of quality that results have."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A measure of quality, and the loss of it that counts as small.

    Attributes:
        name: the field of an evaluation that holds it.
        title: its name on the page.
        allowed: the loss that is allowed when methods are compared by their cost; None for no such comparison.
        lower: whether less is better.
        scale: the factor from the field to the shown number (100: a share in percent).
    """

    name: str
    title: str
    allowed: float | None = None
    lower: bool = False
    scale: float = 1.0

    def loss(self, value: float, dense: float) -> float:
        """Return how much worse ``value`` is than ``dense``; below 0 if it is better."""
        return value - dense if self.lower else dense - value


ACCURACY = Metric("accuracy", "accuracy, %", 1.0, scale=100)
METRICS = (
    Metric("rougeL", "ROUGE-L, points of 100", 5.0),
    Metric("bleu", "BLEU, points of 100"),
    Metric("perplexity", "perplexity", 0.5, lower=True),
    ACCURACY,
    Metric("f1", "F1, %", 1.0, scale=100),
    Metric("matthews", "Matthews correlation, %", 1.0, scale=100),
    Metric("pearson", "Pearson correlation, %", 1.0, scale=100),
    Metric("spearman", "Spearman correlation, %", 1.0, scale=100),
)
"""An evaluation that has several is shown by the first of them, unless the user asks for another.

The paper allows 0.05 ROUGE-L (5 points of 100) and 0.5 perplexity; one point of the others is our choice.
"""

TASK_METRICS = {
    "acc,none": ACCURACY,
    "exact_match,flexible-extract": Metric("exact_match", "exact match, %", 1.0, scale=100),
    "exact_match,strict-match": Metric("strict_match", "exact match, strict, %", 1.0, scale=100),
    "exact_match,none": Metric("exact_match", "exact match, %", 1.0, scale=100),
    "pass@1,create_test": Metric("pass@1", "pass@1, %", 1.0, scale=100),
}
"""Metrics of lm_eval's tasks by its names. A task that has several is shown by the first of them."""
