"""A projection of an FFN whose weight is stored as integers with scales, a row for each neuron."""

from torch import Tensor, nn
from torch.nn import functional as F

from lte.ops.weights import Matrix


class QuantisedLinear(nn.Module):
    """``x weight^T + bias`` with a quantised weight. It computes with floats that it does not keep.

    A linear layer becomes one in its place, by :meth:`become_`, so that its hooks stay. Kernels read :attr:`matrix`.

    Attributes:
        rows, scales: buffers, as :class:`~lte.ops.weights.Matrix` describes them. A row is a neuron, so a down
            projection has the transpose of a linear layer's weight.
        bias: as that of the linear layer.
        transposed: whether a row is an input, as in a down projection.
    """

    rows: Tensor
    scales: Tensor
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    transposed: bool

    @classmethod
    def become_(cls, linear: nn.Module, matrix: Matrix, transposed: bool) -> None:
        """Make ``linear`` quantised, in place.

        Args:
            matrix: its weight, quantised, with a row for each neuron.
            transposed: whether a neuron is an input of the layer.
        """
        assert matrix.scales is not None
        sizes = matrix.shape if transposed else matrix.shape[::-1]
        del linear.weight
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.in_features, linear.out_features = sizes
        linear.transposed = transposed
        linear.register_buffer("rows", matrix.rows)
        linear.register_buffer("scales", matrix.scales)

    @property
    def matrix(self) -> Matrix:
        """The weight, a row for each neuron."""
        return Matrix(self.rows, self.scales)

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output.

        Raises:
            ValueError: in training. Integers cannot learn.
        """
        if self.training:
            raise ValueError("quantised experts cannot be trained: train the model that they were made from")
        weight = self.matrix.floats(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, weight.T if self.transposed else weight, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.matrix.bits}"


def is_quantised(model: nn.Module) -> bool:
    """Return whether a projection of the model is quantised."""
    return any(isinstance(module, QuantisedLinear) for module in model.modules())
