"""The weights of one sparse FFN, as the operation takes them: six parts, and the one place that lists their tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
"""``gelu`` is the exact one (erf), ``gelu_tanh`` its tanh approximation, ``relu2`` ReLU squared."""
_ACTIVATIONS = get_args(Activation)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix as kernels read it: row by row. How its numbers are stored is said here, and nowhere else."""

    rows: Tensor


@dataclass(frozen=True, eq=False)
class Affine:
    """A projection: a matrix, and what is added to the product."""

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
    """``down(act(gate(x)) * up(x))``, of the experts that the router picks.

    Neurons of an expert are contiguous. An FFN without a gate computes ``down(act(up(x)))``. With compensation
    ``idle * expand (compress x + bias)`` is added, where ``idle`` is the share of experts not picked.

    Shapes: T tokens, D model width, F neurons, E experts of N neurons each (F = E * N), R rank of the compensation.

    Attributes:
        up, gate: ``[F, D]``, with a bias ``[F]`` or None.
        down: ``[F, D]``, the transpose of what a linear layer keeps: row f is what neuron f adds to the output. Its
            bias ``[D]`` is added whatever is active.
        router: of E experts.
        compensation: None adds nothing.
        act: the activation, by name.
        tensors: all tensors in the order of :data:`TENSORS`, None for each that is not there.

    Raises:
        ValueError: shapes that do not belong together, an unknown activation.
    """

    up: Affine
    down: Affine
    router: RouterWeights
    gate: Affine | None = None
    compensation: LowRank | None = None
    act: Activation = "silu"
    tensors: tuple[Tensor | None, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:  # on the path of every layer of every token: no loops, no slices of shapes
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
        """Of the compensation; 0 where there is none."""
        return 0 if self.compensation is None else self.compensation.compress.rows.shape[0]

    def without_compensation(self) -> "FFNWeights":
        """The same FFN with idle experts left out and nothing in their place."""
        return replace(self, compensation=None)

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """The tensors that are there, each with its name of :data:`TENSORS`."""
        return [(name, tensor) for name, tensor in zip(TENSORS, self.tensors, strict=True) if tensor is not None]


def _fits(name: str, tensor: Tensor | None, shape: tuple[int, ...], up: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, but beside up {tuple(up)} it is {tuple(shape)}")


def unflatten(tensors: Sequence[Tensor | None], threshold: float, act: Activation) -> FFNWeights:
    """The weights whose ``tensors`` these are."""
    leaves = {**dict(zip(TENSORS, tensors, strict=True)), "router.threshold": threshold, "act": act}
    return _part(FFNWeights, leaves, "")


def _part(kind: type, leaves: dict[str, Any], above: str) -> Any:
    """A part of the weights from its leaves, which are named by their paths; None where no leaf is there."""
    values = {
        name: _part(inner, leaves, f"{above}{name}.") if inner in _PARTS else leaves[above + name]
        for name, inner in _fields(kind)
    }
    return None if all(value is None for value in values.values()) else kind(**values)


def _flatten(weights: FFNWeights) -> tuple[Tensor | None, ...]:
    found: list[Any] = []
    for path in _PATHS:
        part: Any = weights
        for name in path:
            part = getattr(part, name)
            if part is None:
                break
        found.append(part)
    return tuple(found)


_PARTS = (Matrix, Affine, RouterWeights, LowRank)


@cache
def _fields(kind: type) -> tuple[tuple[str, Any], ...]:
    """What a part is made of: names, each with its type, None left aside."""
    hints = get_type_hints(kind)
    given = [one.name for one in fields(kind) if one.init]
    return tuple((name, (get_args(hints[name]) or [hints[name]])[0]) for name in given)


def _paths(kind: type) -> Iterator[tuple[str, ...]]:
    for name, inner in _fields(kind):
        if inner in _PARTS:
            yield from ((name, *path) for path in _paths(inner))
        elif inner is Tensor:
            yield (name,)


_PATHS = tuple(_paths(FFNWeights))
TENSORS = tuple(".".join(path) for path in _PATHS)
"""The names of the tensors that an FFN may have: ``up.matrix.rows``, ``up.bias`` and so on."""
