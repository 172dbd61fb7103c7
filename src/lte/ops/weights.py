"""The weights of one sparse FFN as the operation takes them: six parts. Only this file lists their tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
"""``gelu`` is the exact GELU (erf), ``gelu_tanh`` its tanh approximation, and ``relu2`` the square of ReLU."""
_ACTIVATIONS = get_args(Activation)


INT4_GROUP = 32
"""The rows of an int4 matrix that share a scale in each column: the neurons of an expert of the usual size."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix ``[R, D]`` as kernels read it, row by row. Only this class says how its numbers are stored.

    - floats: rows ``[R, D]``, without scales.
    - int8: rows int8 ``[R, D]``, and a scale for each output of the projection. Up, gate and router have scales
      ``[R]``: row r is ``rows[r] * scales[r]``. Down has scales ``[1, D]``: column d is ``rows[:, d] * scales[0, d]``.
    - int4: rows uint8 ``[R, D / 2]`` and scales ``[R / 32, D]``. Byte (r, j) holds column j in its low four bits and
      column j + D / 2 in its high four bits, each as q + 8 with q in [-8, 7]. The number at (r, d) is
      ``q * scales[r // 32, d]``.

    Scales have the dtype of the numbers that the matrix stands for.

    Raises:
        ValueError: scales that do not fit the rows, or are missing.
    """

    rows: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:  # runs for every token, as that of FFNWeights
        rows, scales = self.rows, self.scales
        if scales is None:
            if not rows.is_floating_point():
                raise ValueError(f"a matrix has rows of {rows.dtype} without scales: give scales, or float rows")
            return
        if rows.ndim != 2 or rows.dtype not in (torch.int8, torch.uint8) or not scales.is_floating_point():
            raise ValueError(
                f"a matrix has rows {rows.dtype} {tuple(rows.shape)} and scales {scales.dtype}: quantised rows are "
                "int8 [R, D] or uint8 [R, D / 2], and scales are floats"
            )
        R, D = self.shape
        if rows.dtype == torch.uint8 and R % INT4_GROUP:
            raise ValueError(f"an int4 matrix has {R} rows, but they must be a multiple of {INT4_GROUP}: take int8")
        expected = ((R,), (1, D)) if rows.dtype == torch.int8 else ((R // INT4_GROUP, D),)
        if scales.shape not in expected:
            raise ValueError(
                f"a matrix has rows {rows.dtype} {tuple(rows.shape)} and scales {tuple(scales.shape)}, "
                f"but beside them scales are {' or '.join(map(str, expected))}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers, ``[R, D]``."""
        shape = self.rows.shape
        return (shape[0], 2 * shape[1]) if self.rows.dtype == torch.uint8 else shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the numbers that the matrix stands for."""
        return (self.rows if self.scales is None else self.scales).dtype

    @property
    def bits(self) -> int:
        """The bits of a stored number, without scales: 4, 8, or those of a float."""
        return 4 if self.rows.dtype == torch.uint8 else 8 * self.rows.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """The bytes of rows and scales."""
        return self.rows.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def floats(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers ``[R, D]`` in this dtype. It is a view if they are stored so."""
        rows, scales = self.rows, self.scales
        if scales is None:
            return rows.to(dtype)
        if rows.dtype == torch.int8:
            return (rows.to(dtype) * (scales[:, None] if scales.ndim == 1 else scales)).to(dtype)
        numbers_GND = (torch.cat([rows & 15, rows >> 4], dim=1).to(dtype) - 8).unflatten(0, (-1, INT4_GROUP))
        return (numbers_GND * scales[:, None]).to(dtype).flatten(0, 1)

    def halves(self) -> tuple["Matrix", "Matrix"]:
        """Return the first and the second half of the rows. They are views."""
        rows, scales = self.rows.chunk(2), (None, None) if self.scales is None else self.scales.chunk(2)
        return Matrix(rows[0], scales[0]), Matrix(rows[1], scales[1])


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
        up, router = self.up.matrix.shape, self.router.matrix.shape
        if len(up) != 2 or len(router) != 2 or not router[0] or up[0] % router[0]:
            raise ValueError(
                f"up is {tuple(up)} and router {tuple(router)}, but they are [F, D] and [E, D], F a multiple of E"
            )
        F, D, E = *up, router[0]
        _fits("up.bias", self.up.bias, (F,), up)
        _fits("down", self.down.matrix, up, up)
        _scaled_by_output("up", self.up.matrix, (F,))
        _scaled_by_output("down", self.down.matrix, (1, D))
        _fits("down.bias", self.down.bias, (D,), up)
        _fits("router", self.router.matrix, (E, D), up)
        _fits("router.bias", self.router.bias, (E,), up)
        if gate is not None:
            _fits("gate", gate.matrix, up, up)
            _scaled_by_output("gate", gate.matrix, (F,))
            _fits("gate.bias", gate.bias, (F,), up)
        if low_rank is not None:
            R = max((*low_rank.compress.shape, 1)[0], 1)
            _fits("compensation.compress", low_rank.compress, (R, D), up)
            _fits("compensation.bias", low_rank.bias, (R,), up)
            _fits("compensation.expand", low_rank.expand, (D, R), up)
        object.__setattr__(self, "tensors", _flatten(self))

    @property
    def d_ff(self) -> int:
        return self.up.matrix.shape[0]

    @property
    def d_model(self) -> int:
        return self.up.matrix.shape[1]

    @property
    def num_experts(self) -> int:
        return self.router.matrix.shape[0]

    @property
    def expert_size(self) -> int:
        return self.d_ff // self.num_experts

    @property
    def rank(self) -> int:
        """The rank of the compensation; 0 if there is none."""
        return 0 if self.compensation is None else self.compensation.compress.shape[0]

    @property
    def quantised(self) -> bool:
        """Whether a matrix of the FFN is stored as integers with scales."""
        matrices = (self.up.matrix, self.down.matrix, self.router.matrix, self.gate and self.gate.matrix)
        return any(one is not None and one.scales is not None for one in matrices)

    def without_compensation(self) -> "FFNWeights":
        """Return the same FFN without compensation."""
        return replace(self, compensation=None)

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Return the tensors that are there, each with its name in :data:`TENSORS`."""
        return [(name, tensor) for name, tensor in zip(TENSORS, self.tensors, strict=True) if tensor is not None]


def _fits(name: str, tensor: Tensor | Matrix | None, shape: tuple[int, ...], up: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, but beside up {tuple(up)} it is {tuple(shape)}")


def _scaled_by_output(name: str, matrix: Matrix, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the scales of a matrix in int8 belong to the outputs of the projection."""
    scales = matrix.scales
    if scales is not None and matrix.rows.dtype == torch.int8 and scales.shape != shape:
        raise ValueError(
            f"{name} in int8 has scales {tuple(scales.shape)}, but a scale for each of its outputs: {shape}"
        )


TENSORS = (
    *("up.matrix.rows", "up.matrix.scales", "up.bias", "down.matrix.rows", "down.matrix.scales", "down.bias"),
    *("router.matrix.rows", "router.matrix.scales", "router.bias"),
    *("gate.matrix.rows", "gate.matrix.scales", "gate.bias"),
    *("compensation.compress.rows", "compensation.bias", "compensation.expand.rows"),
)
"""The names of the tensors that an FFN may have, in the order of :attr:`FFNWeights.tensors`. A compensation has floats.
"""


def _flatten(
    weights: FFNWeights,
) -> tuple[Tensor | None, ...]:  # written out like :func:`unflatten`, because it runs for every token
    up, down, router = weights.up, weights.down, weights.router
    gate, low_rank = weights.gate, weights.compensation
    return (
        *(up.matrix.rows, up.matrix.scales, up.bias, down.matrix.rows, down.matrix.scales, down.bias),
        *(router.matrix.rows, router.matrix.scales, router.bias),
        *((None, None, None) if gate is None else (gate.matrix.rows, gate.matrix.scales, gate.bias)),
        *((None, None, None) if low_rank is None else (low_rank.compress.rows, low_rank.bias, low_rank.expand.rows)),
    )


def unflatten(tensors: Sequence[Tensor | None], threshold: float, act: Activation) -> FFNWeights:
    """Return the weights that have these ``tensors``."""
    up, up_scales, up_bias, down, down_scales, down_bias, *others = cast(Any, tensors)
    router, router_scales, router_bias, gate, gate_scales, gate_bias, compress, bias, expand = others
    return FFNWeights(
        Affine(Matrix(up, up_scales), up_bias),
        Affine(Matrix(down, down_scales), down_bias),
        RouterWeights(Matrix(router, router_scales), router_bias, threshold),
        None if gate is None else Affine(Matrix(gate, gate_scales), gate_bias),
        None if compress is None else LowRank(Matrix(compress), bias, Matrix(expand)),
        act,
    )
