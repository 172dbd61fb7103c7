"""The weights of one sparse FFN as the operation takes them: six parts. Only this file lists their tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
"""``gelu`` is the exact GELU (erf), ``gelu_tanh`` its tanh approximation, and ``relu2`` the square of ReLU."""
_ACTIVATIONS = get_args(Activation)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix as kernels read it, row by row. Only this class says how its numbers are stored."""

    rows: Tensor


@dataclass(frozen=True, eq=False)
class Affine:
    """A projection: a matrix and a bias, which is added to the product."""

    matrix: Matrix
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RouterWeights:
    """LTE's router: an expert is active when ``x . row + bias > threshold``.

    Shapes: matrix ``[E, D]``, bias ``[E]``. The threshold is ``logit(tau)``.
    """

    matrix: Matrix
    bias: Tensor | None = None
    threshold: float = 0.0


@dataclass(frozen=True, eq=False)
class LowRank:
    """``expand (compress x + bias)``. Shapes: compress ``[R, D]``, bias ``[R]``, expand ``[D, R]``."""

    compress: Matrix
    bias: Tensor
    expand: Matrix


@dataclass(frozen=True, eq=False)
class FFNWeights:
    """``down(act(gate(x)) * up(x))`` over the experts that the router chooses.

    The neurons of an expert are contiguous. An FFN without a gate computes ``down(act(up(x)))``. A compensation adds
    ``idle * expand (compress x + bias)``, where ``idle`` is the share of experts that are not chosen.

    Shapes: T tokens, D model width, F neurons, E experts of N neurons each (F = E * N), R rank of the compensation.

    Attributes:
        up, gate: ``[F, D]``, with a bias ``[F]`` or None.
        down: ``[F, D]``, the transpose of a linear layer's weight. Neuron f adds a multiple of row f to the output. The
            bias ``[D]`` is always added.
        router: of E experts.
        compensation: None adds nothing.
        act: the activation, by name.
        tensors: all tensors in the order of :data:`TENSORS`, with None for a tensor that is not there.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation.
    """

    up: Affine
    down: Affine
    router: RouterWeights
    gate: Affine | None = None
    compensation: LowRank | None = None
    act: Activation = "silu"
    tensors: tuple[Tensor | None, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:  # every layer runs this for every token: no loops, no slices of shapes
        gate, low_rank = self.gate, self.compensation
        if self.act not in _ACTIVATIONS:
            raise ValueError(f"act is {self.act!r}, but it is one of {', '.join(_ACTIVATIONS)}")
        up, router = self.up.matrix.rows.shape, self.router.matrix.rows.shape
        if len(up) != 2 or len(router) != 2 or not router[0] or up[0] % router[0]:
            raise ValueError(
                f"up is {tuple(up)} and router {tuple(router)}, but they are [F, D] and [E, D], F a multiple of E"
            )
        F, D, E = *up, router[0]
        _fits("up.bias", self.up.bias, (F,), up)
        _fits("down", self.down.matrix.rows, up, up)
        _fits("down.bias", self.down.bias, (D,), up)
        _fits("router", self.router.matrix.rows, (E, D), up)
        _fits("router.bias", self.router.bias, (E,), up)
        if gate is not None:
            _fits("gate", gate.matrix.rows, up, up)
            _fits("gate.bias", gate.bias, (F,), up)
        if low_rank is not None:
            R = max((*low_rank.compress.rows.shape, 1)[0], 1)
            _fits("compensation.compress", low_rank.compress.rows, (R, D), up)
            _fits("compensation.bias", low_rank.bias, (R,), up)
            _fits("compensation.expand", low_rank.expand.rows, (D, R), up)
        object.__setattr__(self, "tensors", _flatten(self))

    @property
    def d_ff(self) -> int:
        return self.up.matrix.rows.shape[0]

    @property
    def d_model(self) -> int:
        return self.up.matrix.rows.shape[1]

    @property
    def num_experts(self) -> int:
        return self.router.matrix.rows.shape[0]

    @property
    def expert_size(self) -> int:
        return self.d_ff // self.num_experts

    @property
    def rank(self) -> int:
        """The rank of the compensation; 0 if there is none."""
        return 0 if self.compensation is None else self.compensation.compress.rows.shape[0]

    def without_compensation(self) -> "FFNWeights":
        """Return the same FFN without compensation."""
        return replace(self, compensation=None)

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Return the tensors that are there, each with its name in :data:`TENSORS`."""
        return [(name, tensor) for name, tensor in zip(TENSORS, self.tensors, strict=True) if tensor is not None]


def _fits(name: str, tensor: Tensor | None, shape: tuple[int, ...], up: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, but beside up {tuple(up)} it is {tuple(shape)}")


TENSORS = (
    *("up.matrix.rows", "up.bias", "down.matrix.rows", "down.bias", "router.matrix.rows", "router.bias"),
    *("gate.matrix.rows", "gate.bias", "compensation.compress.rows", "compensation.bias", "compensation.expand.rows"),
)
"""The names of the tensors that an FFN may have, in the order of :attr:`FFNWeights.tensors`."""


def _flatten(
    weights: FFNWeights,
) -> tuple[Tensor | None, ...]:  # written out like :func:`unflatten`, because it runs for every token
    up, down, router = weights.up, weights.down, weights.router
    gate, low_rank = weights.gate, weights.compensation
    return (
        *(up.matrix.rows, up.bias, down.matrix.rows, down.bias, router.matrix.rows, router.bias),
        *((None, None) if gate is None else (gate.matrix.rows, gate.bias)),
        *((None, None, None) if low_rank is None else (low_rank.compress.rows, low_rank.bias, low_rank.expand.rows)),
    )


def unflatten(tensors: Sequence[Tensor | None], threshold: float, act: Activation) -> FFNWeights:
    """Return the weights that have these ``tensors``."""
    up, up_bias, down, down_bias, router, router_bias, gate, gate_bias, compress, bias, expand = cast(Any, tensors)
    return FFNWeights(
        Affine(Matrix(up), up_bias),
        Affine(Matrix(down), down_bias),
        RouterWeights(Matrix(router), router_bias, threshold),
        None if gate is None else Affine(Matrix(gate), gate_bias),
        None if compress is None else LowRank(Matrix(compress), bias, Matrix(expand)),
        act,
    )
