"""The weights of one sparse FFN, as the operation takes them: one row a neuron in all three matrices."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
"""``gelu`` is the exact one (erf), ``gelu_tanh`` its tanh approximation, ``relu2`` ReLU squared."""
_ACTIVATIONS = get_args(Activation)


@dataclass(frozen=True)
class FFNWeights:
    """``down(act(gate x + gate_bias) * (up x + up_bias)) + down_bias``, of the experts that the router picks.

    Neurons of an expert are contiguous. An FFN without a gate computes ``down(act(up x + up_bias))``. With compensation
    ``idle * expand (compress x + compress_bias)`` is added, where ``idle`` is the share of experts not picked.

    Shapes: T tokens, D model width, F neurons, E experts of N neurons each (F = E * N), R rank of the compensation.

    Attributes:
        up: ``[F, D]``.
        down: ``[F, D]``, the transpose of what a linear layer keeps: row f is what neuron f adds to the output.
        router: ``[E, D]``.
        gate: ``[F, D]``, or None.
        router_bias: ``[E]``, or None.
        up_bias, gate_bias: ``[F]``, or None. ``down_bias``: ``[D]``, or None; added whatever is active.
        compress, compress_bias, expand: ``[R, D]``, ``[R]`` and ``[D, R]``, or None, all three: no compensation.
        act: the activation, by name.
        threshold: an expert is active when ``x . router + router_bias > threshold``. It is ``logit(tau)``.

    Raises:
        ValueError: shapes that do not belong together, an unknown activation.
    """

    up: Tensor
    down: Tensor
    router: Tensor
    gate: Tensor | None = None
    router_bias: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    compress: Tensor | None = None
    compress_bias: Tensor | None = None
    expand: Tensor | None = None
    act: Activation = "silu"
    threshold: float = 0.0

    def __post_init__(self) -> None:  # on the path of every layer of every token: no loops over what is not there
        if self.act not in _ACTIVATIONS:
            raise ValueError(f"act is {self.act!r}, but it is one of {', '.join(_ACTIVATIONS)}")
        up, router = self.up.shape, self.router.shape
        if len(up) != 2 or len(router) != 2 or not router[0] or up[0] % router[0]:
            raise ValueError(
                f"up is {tuple(up)} and router {tuple(router)}, but they are [F, D] and [E, D], F a multiple of E"
            )
        _fits("down", self.down, up, up)
        _fits("gate", self.gate, up, up)
        _fits("router", self.router, (router[0], up[1]), up)
        _fits("router_bias", self.router_bias, router[:1], up)
        _fits("up_bias", self.up_bias, up[:1], up)
        _fits("gate_bias", self.gate_bias, up[:1], up)
        _fits("down_bias", self.down_bias, up[1:], up)
        if self.gate_bias is not None and self.gate is None:
            raise ValueError("gate_bias is given, but there is no gate")
        if not (self.compress is None) == (self.compress_bias is None) == (self.expand is None):
            raise ValueError("compress, compress_bias and expand belong together: give all three, or none")
        if self.compress is not None:
            rank = self.compress.shape[:1] or (1,)
            _fits("compress", self.compress, (max(rank[0], 1), up[1]), up)
            _fits("compress_bias", self.compress_bias, rank, up)
            _fits("expand", self.expand, (up[1], rank[0]), up)

    @property
    def d_ff(self) -> int:
        return self.up.shape[0]

    @property
    def d_model(self) -> int:
        return self.up.shape[1]

    @property
    def num_experts(self) -> int:
        return self.router.shape[0]

    @property
    def expert_size(self) -> int:
        return self.d_ff // self.num_experts

    @property
    def rank(self) -> int:
        """Of the compensation; 0 where there is none."""
        return 0 if self.compress is None else self.compress.shape[0]

    def without_compensation(self) -> "FFNWeights":
        """The same FFN with idle experts left out and nothing in their place."""
        return replace(self, compress=None, compress_bias=None, expand=None)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {name: value for name, value in self.arguments().items() if isinstance(value, Tensor)}

    def arguments(self) -> dict[str, Any]:
        """All fields by name, as they are."""
        return {name: getattr(self, name) for name in _FIELDS}


def _fits(name: str, tensor: Tensor | None, shape: tuple[int, ...], up: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, but beside up {tuple(up)} it is {tuple(shape)}")


_FIELDS = tuple(field.name for field in fields(FFNWeights))
