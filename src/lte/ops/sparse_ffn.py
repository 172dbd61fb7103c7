"""``sparse_ffn``: an FFN where each token uses the experts that its router chooses. This file chooses the backend."""

import logging
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lte.ops import reference
from lte.ops.weights import Activation, FFNWeights, unflatten

logger = logging.getLogger(__name__)

BackendName = Literal["auto", "reference", "triton", "cpu"]
BACKENDS = get_args(BackendName)

COMPILED: dict[str, BackendName] = {"cuda": "triton", "cpu": "cpu"}
"""The backend made for a type of device."""


class Backend(Protocol):
    """The functions of a backend's module."""

    def refuses(self, x_TD: Tensor, weights: FFNWeights) -> str | None:
        """Return why it cannot compute this, in one line; None if it can."""
        ...

    def pays(self, x_TD: Tensor, weights: FFNWeights) -> bool:
        """Return whether it is the fastest for this, by measured crossovers. Called only if it does not refuse."""
        ...

    def sparse_ffn(self, x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None = None) -> Tensor:
        """Compute the FFN for at least one token. The arguments have been checked."""
        ...


@cache
def load_backend(name: str) -> Backend:
    """Return a backend's module. It imports its compiler, so it is imported only when it is first used."""
    return cast(Backend, import_module(f"lte.ops.{name}"))


def sparse_ffn(x: Tensor, weights: FFNWeights, active: Tensor | None = None, backend: BackendName = "auto") -> Tensor:
    """Return an FFN's output without its inactive experts (hard selection, LTE paper section 4.2).

    Active experts are not scaled. If the weights have a compensation, it is added.

    Args:
        x: ``[..., D]``.
        weights: the FFN, see :class:`FFNWeights`.
        active: bool ``[..., E]``, instead of the router's choice.
        backend: ``auto`` takes the fastest for device, dtype, shape and number of tokens. A backend that is named
            runs or raises, unless there are no tokens. Only ``reference``, plain PyTorch, computes gradients.

    Returns:
        ``[..., D]``, in ``x``'s dtype.

    Raises:
        ValueError: an unknown backend, a backend that cannot compute this (with its reason), or shapes or devices
            that do not fit.
    """
    _check(x, weights, active, backend)
    x_TD = x.reshape(-1, weights.d_model)
    active_TE = None if active is None else active.reshape(-1, weights.num_experts)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights.tensors))
    if needs_gradient and backend not in ("auto", "reference"):
        raise ValueError(
            f"backend {backend!r} computes no gradient: call it under torch.no_grad(), or take 'reference'"
        )
    if needs_gradient or backend == "reference":
        y_TD = reference.sparse_ffn(x_TD, weights, active_TE)
    elif torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        y_TD = _opaque(x_TD, weights.tensors, weights.router.threshold, weights.act, active_TE, backend)
    else:
        y_TD = _run(x_TD, weights, active_TE, backend)
    return y_TD.view(x.shape)


def choose(x_TD: Tensor, weights: FFNWeights, backend: BackendName) -> BackendName:
    """Return the name of the backend that computes this.

    Raises:
        ValueError: a named backend cannot compute this.
    """
    if backend == "auto":
        name = COMPILED.get(x_TD.device.type)
        if name is None:
            return "reference"
        reason = _why_not(name, x_TD, weights)
        if reason is not None:
            _say_once(f"{name} backend not used: {reason}")
            return "reference"
        return name if load_backend(name).pays(x_TD, weights) else "reference"
    reason = _why_not(backend, x_TD, weights)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run here: {reason}")
    return backend


def _run(x_TD: Tensor, weights: FFNWeights, active_TE: Tensor | None, backend: BackendName) -> Tensor:
    if x_TD.shape[0] == 0:
        return torch.empty_like(x_TD)
    return load_backend(choose(x_TD, weights, backend)).sparse_ffn(x_TD, weights, active_TE)


def _why_not(name: str, x_TD: Tensor, weights: FFNWeights) -> str | None:
    return missing(name) or load_backend(name).refuses(x_TD, weights)


@cache
def missing(name: str) -> str | None:
    """Return why a backend's module cannot be imported; None if it can. Cached: a failing import is slow."""
    try:
        load_backend(name)
    except ImportError as error:
        return f"{error}; pip install 'lte[{name}]'"
    return None


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _check(x: Tensor, weights: FFNWeights, active: Tensor | None, backend: BackendName) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, but it is one of {', '.join(BACKENDS)}")
    if x.ndim == 0 or x.shape[-1] != weights.d_model:
        raise ValueError(f"x is {tuple(x.shape)}, but this FFN takes [..., {weights.d_model}]")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}, but it must be floating point")
    device = x.device
    for name, tensor in weights.named_tensors():
        if tensor.device != device:
            raise ValueError(f"x is on {device}, but {name} is on {tensor.device}: move one of them")
    if active is not None:
        expected = (*x.shape[:-1], weights.num_experts)
        if (active.dtype, active.shape, active.device) != (torch.bool, expected, device):
            raise ValueError(
                f"active is {active.dtype} {tuple(active.shape)} on {active.device}, "
                f"but it must be torch.bool {expected} on {device}"
            )


@torch.library.custom_op("lte::sparse_ffn", mutates_args=())
def _opaque(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    threshold: float,
    act: str,
    active: Tensor | None,
    backend: str,
) -> Tensor:
    """The one call that ``torch.compile`` and ``torch.export`` see. They do not look inside."""
    return _run(x, unflatten(tensors, threshold, cast(Activation, act)), active, cast(BackendName, backend))


@_opaque.register_fake
def _(x: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
