"""Sparse FFNs that skip their idle experts: ``SparseFFN`` and ``SparseActivation`` that call ``sparse_ffn``."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lte.core.selection import threshold
from lte.inference.graphs import Replays
from lte.modules.compensation import Compensation
from lte.modules.quantised_linear import QuantisedLinear
from lte.modules.router import Router
from lte.modules.sparse_ffn import Selecting, SparseActivation, SparseFFN
from lte.ops.reference import activate
from lte.ops.sparse_ffn import BackendName, sparse_ffn
from lte.ops.weights import Activation, Affine, FFNWeights, Matrix, RouterWeights

PLAIN = (nn.Parameter, FakeTensor)  # no subclass of a quantiser; torch.export uses fake tensors


@dataclass(frozen=True)
class Projection:
    """A linear layer of an FFN and its place in the model, so that a later wrapper in that place is noticed.

    Attributes:
        transposed: whether its weight is ``[D, F]``, as ``nn.Linear`` keeps a down projection.
        pre_hooks, hooks: how many forward pre-hooks and hooks are ours.
    """

    linear: nn.Module
    parent: nn.Module
    name: str
    transposed: bool
    pre_hooks: int = 0
    hooks: int = 0

    def untouched(self) -> bool:
        """Return whether a call of the layer only multiplies by its weight: no adapter, quantiser or hook was added."""
        linear = self.linear
        return (
            self.parent._modules.get(self.name) is linear
            and (self.quantised or type(linear._parameters.get("weight")) in PLAIN)  # pruning and weight norm move it
            and "bias" in linear._parameters
            and "forward" not in vars(linear)  # offloading replaces it
            and len(linear._forward_hooks) == self.hooks
            and len(linear._forward_pre_hooks) == self.pre_hooks
        )

    @property
    def quantised(self) -> bool:
        return isinstance(self.linear, QuantisedLinear)

    def rows(self) -> Tensor:
        """Return a weight of floats as ``[F, D]``, one row for each neuron. It is a view."""
        weight = self.linear._parameters["weight"]
        assert weight is not None
        return weight.t() if self.transposed else weight

    def weights(self) -> Affine:
        linear = self.linear
        matrix = linear.matrix if isinstance(linear, QuantisedLinear) else Matrix(self.rows())
        return Affine(matrix, linear._parameters["bias"])

    @torch.no_grad()
    def pack_(self) -> None:
        """Make :meth:`rows` contiguous. Shape, values and the Parameter do not change. Quantised rows are so."""
        if self.quantised:
            return
        rows_FD = self.rows().contiguous()  # no copy if it is contiguous already
        self.linear.weight.data = rows_FD.t() if self.transposed else rows_FD


@dataclass(frozen=True)
class Packed:
    """The parts of an optimised layer besides router and compensation: projections, activation name, backend."""

    up: Projection
    down: Projection
    gate: Projection | None
    fused_gate_up: bool
    act: Activation
    backend: BackendName

    @cached_property
    def linears(self) -> list[nn.Module]:
        return [one.linear for one in (self.gate, self.up, self.down) if one is not None]

    def untouched(self) -> bool:
        return self.up.untouched() and self.down.untouched() and (self.gate is None or self.gate.untouched())

    def weights(self, router: Router, compensation: Compensation | None, tau: float) -> FFNWeights:
        """Return views of the current weights. Parameters may have been moved, cast or replaced since the last call."""
        up, gate = self.up.weights(), None if self.gate is None else self.gate.weights()
        if self.fused_gate_up:
            gate, up = _halves(up)
        return FFNWeights(
            up=up,
            down=self.down.weights(),
            router=RouterWeights(Matrix(router.weight), router.bias, logit(tau)),
            gate=gate,
            compensation=None if compensation is None else compensation.weights,
            act=self.act,
        )


class PackedLayer(Selecting):
    """Base of both forms: it decides when experts are skipped, and runs ``sparse_ffn``."""

    packed: Packed
    replays: Replays

    def skips(self, x_TD: Tensor) -> bool:
        """Return whether idle experts are skipped in this pass.

        All experts are computed in training, with gradients, under autocast and in other modes. This is also so if
        projections, routers or compensations were wrapped or got hooks.
        """
        return (
            self.mode == "hard"
            and not self.training
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x_TD.device.type)
            and _plain(self.router, Router)
            and (self.compensation is None or _plain(self.compensation, Compensation))
            and self.packed.untouched()
        )

    def run(self, x_TD: Tensor) -> Tensor:
        """Return the FFN's output, computed by ``sparse_ffn``."""
        if self.recorded:
            scores_TE = self.router(x_TD)
            self.keep(scores_TE)
            return self._compute(x_TD, threshold(scores_TE, self.tau))
        if x_TD.is_cuda and not torch.compiler.is_compiling() and type(x_TD) is Tensor:
            return self.replays(x_TD, self._key(x_TD), self._compute)
        return self._compute(x_TD)

    def _compute(self, x_TD: Tensor, active_TE: Tensor | None = None) -> Tensor:
        weights = self.packed.weights(self.lte_router, self.compensation, self.tau)
        return sparse_ffn(x_TD, weights, active_TE, self.packed.backend)

    def _key(self, x_TD: Tensor) -> tuple[object, ...]:
        """Return all that an output depends on besides the input, including the addresses of weights."""
        layers = (self.router, *self.packed.linears)
        tensors = [one for layer in layers for one in layer._parameters.values() if one is not None]
        tensors += [one for linear in self.packed.linears for one in linear._buffers.values() if one is not None]
        if self.compensation is not None:
            tensors += self.compensation.parameters()
        places = [one.data_ptr() for one in tensors]
        return x_TD.dtype, self.tau, self.packed.backend, *places

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.packed.backend!r}"


class PackedFFN(PackedLayer, SparseFFN):
    """A ``SparseFFN`` that skips its idle experts."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.run(x_TD) if self.skips(x_TD) else super().forward(x_TD)


class PackedActivation(PackedLayer, SparseActivation):
    """A ``SparseActivation`` that computes the whole FFN. Its projections, ``BypassedLinear``, return their input."""

    def forward(self, hidden_TF: Tensor) -> Tensor:
        x_TD = self.take_input()
        return self.run(x_TD) if self.skips(x_TD) else self.select(x_TD, hidden_TF)


class Bypassed(nn.Module):
    """A projection of a :class:`PackedActivation`. It returns its input if that layer computes the whole FFN."""

    layer: tuple[PackedActivation]  # in a tuple, so that it does not become a child

    def forward(self, input: Tensor) -> Tensor:
        return input if self.layer[0].skips(input) else super().forward(input)


class BypassedLinear(Bypassed, nn.Linear):
    """An ``nn.Linear`` that is bypassed."""


class BypassedQuantisedLinear(Bypassed, QuantisedLinear):
    """A ``QuantisedLinear`` that is bypassed."""


BYPASSED = {nn.Linear: BypassedLinear, QuantisedLinear: BypassedQuantisedLinear}


def _halves(both: Affine) -> tuple[Affine, Affine]:
    """Split a projection into gate, its first half, and up, its second half."""
    gate, up = both.matrix.halves()
    bias = (None, None) if both.bias is None else both.bias.chunk(2)
    return Affine(gate, bias[0]), Affine(up, bias[1])


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module is of its own type and without hooks. For example, peft can replace it by a wrapper."""
    return (
        type(module) is kind
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def activation_name(act: nn.Module) -> Activation | None:
    """Return the activation's name in ``sparse_ffn``, found by what it computes; None if ``sparse_ffn`` lacks it."""
    if next(act.parameters(), None) is not None:  # its function may change
        return None
    x = torch.cat([torch.linspace(-20, 20, 2001), torch.tensor([-1e3, 1e3])])
    y = act(x)
    names: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
    return next((name for name in names if torch.allclose(activate(x, name), y, rtol=1e-5, atol=2e-6)), None)


def logit(tau: float) -> float:
    """Return the logit at which the score is tau: an expert is active when its logit is higher."""
    if not 0 < tau < 1:
        return math.inf if tau >= 1 else -math.inf
    return math.log(tau / (1 - tau))
