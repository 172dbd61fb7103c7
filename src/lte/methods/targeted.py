"""The common part of methods with a target sparsity: the option, and the number of experts of a token."""

from dataclasses import dataclass

from lte.surgery.method import Method


@dataclass(frozen=True)
class Targeted(Method):
    """Base of methods with a target sparsity.

    Attributes:
        target_sparsity: fraction of idle neurons, in (0, 1).

    Raises:
        ValueError: it is outside its range.
    """

    target_sparsity: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.target_sparsity < 1:
            raise ValueError(
                f"target_sparsity is {self.target_sparsity}, but it is the fraction of idle neurons: "
                "between 0 and 1, e.g. 0.5"
            )

    def num_active(self, num_experts: int) -> int:
        """Return the number of experts that a token uses.

        Raises:
            ValueError: it would be 0.
        """
        count = round((1 - self.target_sparsity) * num_experts)
        if count < 1:
            raise ValueError(
                f"target_sparsity {self.target_sparsity} leaves none of {num_experts} experts: ask for less, "
                "or for smaller experts"
            )
        return count
