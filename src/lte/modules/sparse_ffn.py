"""The sparse FFN: the projections of a dense model, and a router that chooses the experts."""

import threading
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from lte.core.selection import scale_experts, threshold
from lte.modules.compensation import Compensation
from lte.modules.kept import Kept, of_this_thread
from lte.modules.router import BaseRouter, Router
from lte.modules.tensor_parallel import ExpertShard

Mode = Literal["dense", "soft", "hard"]
"""dense: all experts, without the router. soft: each expert is scaled by its score. hard: an expert is kept or dropped
without scaling. (A mixture of experts scales in mode hard too, ``BaseRouter.scales``.)"""


class Selecting(nn.Module):
    """The base of both sparse modules: a router, a threshold, a mode, and lists for scores.

    Attributes:
        compensation: adds the output of a linear map that stands in for idle experts; None adds nothing.
        num_neurons: F, of the whole FFN.
        shard: the experts of this process under tensor parallelism; None if it has all.
        kept_in: lists to which each pass appends its scores ``[..., E]``.
            :func:`~lte.modules.recording.record_scores` adds them.
    """

    def __init__(self, router: BaseRouter, tau: float, compensation: Compensation | None, down: nn.Module):
        super().__init__()
        self.router = router
        self.compensation = compensation
        self.tau = tau
        self.mode: Mode = "dense"
        self.num_neurons = inputs_of(down)
        self.shard: ExpertShard | None = None
        self.kept_in: Kept = []

    def reset(self, generator: torch.Generator | None = None, bias: float = 0.0) -> None:
        """Initialise the router, with ``bias`` if it has one, and the compensation."""
        self.router.reset(bias, generator)
        if self.compensation is not None:
            self.compensation.reset(generator)

    def set_mode(self, mode: Mode) -> None:
        """Switch the mode.

        Raises:
            ValueError: the mode is not one of dense, soft, hard.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}, but it is one of {', '.join(get_args(Mode))}")
        self.mode = mode

    @property
    def num_weights(self) -> int:
        """The weights that a token multiplies besides its active neurons: those of router and compensation."""
        return self.router.num_weights + (0 if self.compensation is None else self.compensation.num_weights)

    @property
    def lte_router(self) -> Router:
        """The router, which must be LTE's (``check_lte_routers`` raises the error for users)."""
        assert self.router.is_lte
        return cast(Router, self.router)  # peft may have wrapped it

    @property
    def recorded(self) -> bool:
        """Whether a list keeps the scores of this pass."""
        return bool(of_this_thread(self.kept_in))

    def keep(self, scores_TE: Tensor) -> None:
        """Append scores to the lists of this thread."""
        for kept in of_this_thread(self.kept_in):
            kept.append(scores_TE)

    def weigh(self, x_TD: Tensor, fired_TF: Tensor, hidden_TF: Tensor) -> Tensor | None:
        """Return the weight of each expert ``[..., E]`` for the mode: a score, or whether it is kept. None keeps all.

        Under tensor parallelism the result may have only this process's experts, if no other scores are needed.

        Args:
            x_TD: the FFN's input.
            fired_TF: the output of the activation. In an FFN without a gate these are the neurons.
            hidden_TF: the neurons. In a gated FFN they are the activation times up.
        """
        if self.mode == "dense":
            if self.recorded:
                self.keep(torch.ones(*hidden_TF.shape[:-1], self.router.num_experts, device=hidden_TF.device))
            return None
        if self.router.reads != "input":
            read_TF = fired_TF if self.router.reads == "activation" else hidden_TF
            shard = self._shard_of(read_TF)
            scores_TE = self.router(read_TF if shard is None else shard.gather(read_TF))
        elif self._needs_own_scores_only() and (shard := self._shard_of(hidden_TF)) is not None:
            scores_TE = self.router(x_TD, shard.own)
        else:
            scores_TE = self.router(x_TD)
        self.keep(scores_TE)
        if self.mode == "hard" and not self.router.scales:
            return threshold(scores_TE, self.tau)
        return scores_TE

    def _needs_own_scores_only(self) -> bool:
        """Return whether this process's own scores are enough. Gradients need all scores (see ExpertShard)."""
        return (
            self.shard is not None
            and self.router.is_lte
            and self.compensation is None
            and not self.recorded
            and not torch.is_grad_enabled()
        )

    def _shard_of(self, neurons_TF: Tensor) -> ExpertShard | None:
        """Return the shard of this process; None if it has all neurons.

        Raises:
            ValueError: neurons are missing, and the layer does not know which.
        """
        if neurons_TF.shape[-1] == self.num_neurons:
            return None
        if self.shard is None:
            raise ValueError(
                f"a sparse FFN has {neurons_TF.shape[-1]} of its {self.num_neurons} neurons in this process and does "
                "not know which experts they are: shard the model as it is loaded, by "
                "from_pretrained(..., distributed_config=DistributedConfig(tp_size=...))"
            )
        return self.shard

    def scale(self, hidden_TF: Tensor, weights_TE: Tensor) -> Tensor:
        """Return the neurons ``[..., F]``, each times its expert's weight from :meth:`weigh`."""
        shard = self._shard_of(hidden_TF)
        if shard is not None and weights_TE.shape[-1] == shard.num_experts:
            weights_TE = shard.cut(weights_TE)
        return scale_experts(hidden_TF, weights_TE)

    def compensated(self, y_TD: Tensor, x_TD: Tensor, weights_TE: Tensor | None) -> Tensor:
        """Return the FFN's output ``[..., D]`` plus the compensation of idle experts, if there is one."""
        if self.compensation is None or weights_TE is None:
            return y_TD
        return y_TD + self.compensation(x_TD, weights_TE).to(y_TD.dtype)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, tau={self.tau}"


def inputs_of(linear: nn.Module) -> int:
    """Return the number of inputs of a linear layer. GPT-2's ``Conv1D`` has no attribute for it."""
    inputs = getattr(linear, "in_features", None)
    return inputs if inputs is not None else len(cast(Tensor, linear.weight))


@dataclass(frozen=True)
class Roles:
    """The roles of an FFN module's children, by name: a LoRA wrapper in the place of a child is then used.

    With ``fused_gate_up``, the first half of the output of ``up`` is the gate, and the second half is up.
    """

    up: str
    down: str
    act: str
    gate: str | None = None
    fused_gate_up: bool = False
    hidden_dropout: str | None = None
    output_dropout: str | None = None


class SparseFFN(Selecting):
    """An FFN module in sparse form. It has the dense module's children under their own names.

    Shapes: ``[..., D]`` -> ``[..., D]``. In mode dense it computes the same as the dense module.
    """

    def __init__(
        self,
        dense: nn.Module,
        roles: Roles,
        router: BaseRouter,
        tau: float,
        compensation: Compensation | None = None,
    ):
        super().__init__(router, tau, compensation, getattr(dense, roles.down))
        self.roles = roles
        for name, child in dense.named_children():
            self.add_module(name, child)
        for name in (roles.hidden_dropout, roles.output_dropout):
            if name and not hasattr(self, name):  # some models have the probability instead of a module
                self.add_module(name, nn.Dropout(getattr(dense, name)))

    def forward(self, x_TD: Tensor) -> Tensor:
        roles = self.roles
        act = getattr(self, roles.act)
        hidden_TF = getattr(self, roles.up)(x_TD)
        if roles.fused_gate_up:
            gate_TF, hidden_TF = hidden_TF.chunk(2, dim=-1)
            fired_TF = act(gate_TF)
            hidden_TF = fired_TF * hidden_TF
        elif roles.gate:
            fired_TF = act(getattr(self, roles.gate)(x_TD))
            hidden_TF = fired_TF * hidden_TF
        else:
            fired_TF = hidden_TF = act(hidden_TF)
        if roles.hidden_dropout:
            hidden_TF = getattr(self, roles.hidden_dropout)(hidden_TF)
        weights_TE = self.weigh(x_TD, fired_TF, hidden_TF)
        y_TD = self._down(hidden_TF if weights_TE is None else self.scale(hidden_TF, weights_TE))
        y_TD = self.compensated(y_TD, x_TD, weights_TE)
        return getattr(self, roles.output_dropout)(y_TD) if roles.output_dropout else y_TD

    def _down(self, hidden_TF: Tensor) -> Tensor:
        down = getattr(self, self.roles.down)
        weight = getattr(down, "weight", None)  # quantised weights have another name
        # T5 keeps this one projection in fp32 inside a half precision model
        if (
            isinstance(weight, Tensor)  # after dynamic quantisation it is a method
            and weight.dtype != hidden_TF.dtype
            and weight.dtype.is_floating_point
            and not torch.is_autocast_enabled(hidden_TF.device.type)
        ):
            hidden_TF = hidden_TF.to(weight.dtype)
        return down(hidden_TF)


class _UnderWay(threading.local):
    """Values that one hook of a pass leaves for the next hook, in the pass's thread. A copy starts empty."""

    x_TD: Tensor | None = None
    weighed: tuple[Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()


class SparseActivation(Selecting):
    """The sparse module for a model whose FFN is not one module (OPT, BERT). It replaces the activation.

    The projections ``first`` and ``down`` stay where they are, under their own names. A hook on ``first`` gives the
    FFN's input to the router. A hook on ``down`` adds the compensation, if there is one.

    Shapes: ``[..., F]`` -> ``[..., F]``.
    """

    def __init__(
        self,
        act: nn.Module,
        first: nn.Module,
        down: nn.Module,
        router: BaseRouter,
        tau: float,
        compensation: Compensation | None = None,
    ):
        super().__init__(router, tau, compensation, down)
        self.act = act
        self.x_TD: Tensor | None = None
        self.weighed: tuple[Tensor, Tensor] | None = None
        self._under_way = _UnderWay()
        first.register_forward_pre_hook(self._see)
        if compensation is not None:
            down.register_forward_hook(self._add)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out values between two hooks: the recomputation of a block may stop between them."""
        return {**self.__dict__, "x_TD": None, "weighed": None}

    @property
    def under_way(self) -> "_UnderWay | SparseActivation":
        """Where a pass leaves values for its next hook. It belongs to the thread: threads may share a model.

        While a program is compiled, it is the module, whose attributes become variables of the program.
        """
        return self if torch.compiler.is_compiling() else self._under_way

    def _see(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.under_way.x_TD = args[0]

    def _add(self, _module: nn.Module, _args: tuple[Tensor, ...], y_TD: Tensor) -> Tensor:
        under_way = self.under_way
        weighed, under_way.weighed = under_way.weighed, None
        return y_TD if weighed is None else self.compensated(y_TD, *weighed)

    def take_input(self) -> Tensor:
        """Return the input of the first projection in this pass, and forget it.

        Raises:
            RuntimeError: the first projection did not run.
        """
        under_way = self.under_way
        x_TD, under_way.x_TD = under_way.x_TD, None
        if x_TD is None:
            raise RuntimeError("the router did not see this FFN's input: call the layer, not its activation alone")
        return x_TD

    def forward(self, hidden_TF: Tensor) -> Tensor:
        return self.select(self.take_input(), hidden_TF)

    def select(self, x_TD: Tensor, hidden_TF: Tensor) -> Tensor:
        """Return the activated neurons times their experts' weights. ``hidden_TF`` is the first projection's output."""
        hidden_TF = self.act(hidden_TF)
        weights_TE = self.weigh(x_TD, hidden_TF, hidden_TF)
        if self.compensation is not None:
            self.under_way.weighed = None if weights_TE is None else (x_TD, weights_TE)
        return hidden_TF if weights_TE is None else self.scale(hidden_TF, weights_TE)
