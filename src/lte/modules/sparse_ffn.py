"""The sparse FFN: a dense model's own projections, with a router that decides which experts count."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from lte.core.selection import scale_experts, threshold
from lte.modules.router import BaseRouter, Router

Mode = Literal["dense", "soft", "hard"]
"""dense: all experts, router not run. soft: each expert scaled by its score. hard: kept or dropped, unscaled
(but scaled where the router is of a mixture of experts, ``BaseRouter.scales``)."""


class Selecting(nn.Module):
    """What both places of selection share: a router, a threshold, a mode, and lists that scores are kept in.

    Attributes:
        kept_in: lists to which each pass appends its scores ``[..., E]``; :func:`~lte.modules.recording.record_scores`
            puts them here. Lists, not callables: all layers then look alike to ``torch.compile``.
        hardness: in mode soft, how far an expert's weight has moved from its score (0, the paper's) to the
            0 or 1 of hard selection (1, straight-through). The gradient is the score's throughout. Training
            raises it, so that the model meets hard selection before the hard stage does.
    """

    def __init__(self, router: BaseRouter, tau: float):
        super().__init__()
        self.router = router
        self.tau = tau
        self.mode: Mode = "dense"
        self.hardness = 0.0
        self.kept_in: list[list[Tensor]] = []

    def set_mode(self, mode: Mode) -> None:
        """Switch the mode.

        Raises:
            ValueError: the mode is not one of dense, soft, hard.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}, but it is one of {', '.join(get_args(Mode))}")
        self.mode = mode

    @property
    def linear_router(self) -> Router:
        """The router, where it is LTE's (``check_linear`` says so to users)."""
        assert self.router.is_linear
        return cast(Router, self.router)  # peft can put a wrapper around it

    def keep(self, scores_TE: Tensor) -> None:
        """Append scores to the lists that want them."""
        for kept in self.kept_in:
            kept.append(scores_TE)

    def select(self, x_TD: Tensor, fired_TF: Tensor, hidden_TF: Tensor) -> Tensor:
        """Neurons -> the same, weighted as the mode says.

        Args:
            x_TD: the FFN's input.
            fired_TF: what the activation gave; in an FFN without a gate, the neurons.
            hidden_TF: the neurons: in a gated FFN, the activation times up.
        """
        if self.mode == "dense":
            if self.kept_in:
                self.keep(torch.ones(*hidden_TF.shape[:-1], self.router.num_experts, device=hidden_TF.device))
            return hidden_TF
        reads = self.router.reads
        scores_TE = self.router(x_TD if reads == "input" else fired_TF if reads == "activation" else hidden_TF)
        self.keep(scores_TE)
        if self.mode == "hard" and not self.router.scales:
            return scale_experts(hidden_TF, threshold(scores_TE, self.tau))
        if self.hardness:
            kept_TE = threshold(scores_TE, self.tau).to(scores_TE.dtype)
            scores_TE = scores_TE + self.hardness * (kept_TE - scores_TE).detach()
        return scale_experts(hidden_TF, scores_TE)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, tau={self.tau}"


@dataclass(frozen=True)
class Roles:
    """Which child of an FFN module does what, by its name there (so that a LoRA wrapper put in its place is used).

    With ``fused_gate_up`` the child ``up`` gives the gate in its first half and up in its second.
    """

    up: str
    down: str
    act: str
    gate: str | None = None
    fused_gate_up: bool = False
    hidden_dropout: str | None = None
    output_dropout: str | None = None


class SparseFFN(Selecting):
    """An FFN module in sparse form. It takes over the dense module's children under their own names.

    Shapes: ``[..., D]`` -> ``[..., D]``. In mode dense it computes what the dense module did.
    """

    def __init__(self, dense: nn.Module, roles: Roles, router: BaseRouter, tau: float):
        super().__init__(router, tau)
        self.roles = roles
        for name, child in dense.named_children():
            self.add_module(name, child)
        for name in (roles.hidden_dropout, roles.output_dropout):
            if name and not hasattr(self, name):  # some models keep the probability instead of a module
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
        y_TD = self._down(self.select(x_TD, fired_TF, hidden_TF))
        return getattr(self, roles.output_dropout)(y_TD) if roles.output_dropout else y_TD

    def _down(self, hidden_TF: Tensor) -> Tensor:
        down = getattr(self, self.roles.down)
        dtype = down.weight.dtype
        # T5 keeps this one projection in fp32 inside a half precision model
        if (
            dtype != hidden_TF.dtype
            and dtype.is_floating_point
            and not torch.is_autocast_enabled(hidden_TF.device.type)
        ):
            hidden_TF = hidden_TF.to(dtype)
        return down(hidden_TF)


class SparseActivation(Selecting):
    """Selection for a model whose FFN is not a module of its own (OPT, BERT): it stands where the activation did.

    The projections stay where they are, under their own names. ``watch`` is the first projection; a
    hook there shows the router the FFN's input.

    Shapes: ``[..., F]`` -> ``[..., F]``.
    """

    def __init__(self, act: nn.Module, watch: nn.Module, router: BaseRouter, tau: float):
        super().__init__(router, tau)
        self.act = act
        self._x_TD: Tensor | None = None
        watch.register_forward_pre_hook(self._see)

    def _see(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._x_TD = args[0]

    def forward(self, hidden_TF: Tensor) -> Tensor:
        x_TD, self._x_TD = self._x_TD, None
        if x_TD is None:
            raise RuntimeError("the router did not see this FFN's input: call the layer, not its activation alone")
        hidden_TF = self.act(hidden_TF)
        return self.select(x_TD, hidden_TF, hidden_TF)
