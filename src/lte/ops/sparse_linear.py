"""``sparse_linear``: a linear layer that leaves the weights of small inputs unread. This file chooses the backend."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lte.ops.sparse_ffn import BACKENDS, BackendName, missing

MOST = 3
"""Layers of a launch."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class LinearWeights:
    """The weights of a linear layer, stored by input: an input that is left out is a row that is not read.

    Shapes: I inputs, O outputs. An input whose size is at most ``cut`` counts as 0; None stands for a cut of 0.

    Raises:
        ValueError: shapes that do not fit together.
    """

    rows_IO: Tensor
    bias_O: Tensor | None = None
    cut: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rows_IO.ndim != 2:
            raise ValueError(f"rows are {tuple(self.rows_IO.shape)}, but they are [I, O]")
        if self.bias_O is not None and self.bias_O.shape != self.rows_IO.shape[1:]:
            raise ValueError(f"bias is {tuple(self.bias_O.shape)}, but beside these rows it is [{self.d_out}]")
        if self.cut is not None and self.cut.numel() != 1:
            raise ValueError(f"cut is {tuple(self.cut.shape)}, but it is one number")

    @property
    def d_out(self) -> int:
        return self.rows_IO.shape[1]


def sparse_linear(
    x: Tensor,
    rows_IO: Tensor,
    bias_O: Tensor | None = None,
    cut: Tensor | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """Return ``x @ rows_IO + bias_O``, where inputs that are not larger than the cut count as 0.

    For one token, the kernel does not read the rows of inputs that count as 0.

    Args:
        x: ``[..., I]``.
        rows_IO: the transpose of a linear layer's weight.
        bias_O: None adds nothing.
        cut: a scalar tensor; None leaves out only inputs that are 0.
        backend: as for :func:`lte.sparse_ffn`. ``triton`` takes one token: several tokens need most rows,
            and PyTorch is faster then. There is no kernel for a CPU.

    Returns:
        ``[..., O]``, in the dtype of ``x``.

    Raises:
        ValueError: an unknown backend, a backend that cannot compute this (with its reason), or shapes, dtypes or
            devices that do not fit.
    """
    return sparse_linears(x, [LinearWeights(rows_IO, bias_O, cut)], backend)[0]


def sparse_linears(x: Tensor, layers: Sequence[LinearWeights], backend: BackendName = "auto") -> list[Tensor]:
    """Return :func:`sparse_linear` of one input for each of up to three layers, by one launch."""
    for layer in layers:
        _check(x, layer)
    if choose(x, layers, backend) == "reference":
        return [reference(x, layer) for layer in layers]
    y_TO = _products(x.reshape(1, -1), [layer.rows_IO for layer in layers], [layer.cut for layer in layers])
    made = y_TO.split([layer.d_out for layer in layers], -1)
    pairs = zip(made, layers, strict=True)
    made = [one if layer.bias_O is None else one + layer.bias_O for one, layer in pairs]
    return [one.view(*x.shape[:-1], one.shape[-1]) for one in made]


def reference(x: Tensor, layer: LinearWeights) -> Tensor:
    """As :func:`sparse_linear`, in PyTorch. It reads all rows."""
    if layer.cut is not None:
        x = x.masked_fill(x.abs() <= layer.cut, 0)
    return F.linear(x, layer.rows_IO.t(), layer.bias_O)


def choose(x: Tensor, layers: Sequence[LinearWeights], backend: BackendName) -> BackendName:
    """Return the name of the backend that computes this.

    Raises:
        ValueError: the backend is unknown, or a named backend cannot compute this.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, but it is one of {', '.join(BACKENDS)}")
    if backend == "reference" or (backend == "auto" and not x.is_cuda):
        return "reference"
    reason = refuses(x, layers) if backend != "cpu" else "there is no kernel for a CPU: take 'auto' or 'reference'"
    if reason is None:
        return "triton"
    if backend == "auto":
        return "reference"
    raise ValueError(f"backend {backend!r} cannot run here: {reason}")


def refuses(x: Tensor, layers: Sequence[LinearWeights]) -> str | None:
    """Return why the kernels cannot compute this, in one line; None if they can."""
    tensors = [x, *(one for layer in layers for one in (layer.rows_IO, layer.bias_O) if one is not None)]
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        return "it computes no gradient: call it under torch.no_grad(), or take 'reference'"
    if x.numel() != x.shape[-1]:
        return f"x is {tuple(x.shape)}, and the kernel takes one token"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, and the kernels take float16, bfloat16 and float32"
    if len(layers) > MOST:
        return f"there are {len(layers)} layers, and a launch takes up to {MOST}"
    if not all(layer.rows_IO.is_contiguous() for layer in layers):
        return "rows are not contiguous: call lte.optimize_ for a model, and contiguous() for other tensors"
    return _no_triton(x.is_cuda)


@torch.compiler.assume_constant_result
def _no_triton(cuda: bool) -> str | None:
    if not cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton needs a CUDA device"
    return missing("triton")


def _check(x: Tensor, layer: LinearWeights) -> None:
    rows_IO = layer.rows_IO
    if x.ndim == 0 or x.shape[-1] != rows_IO.shape[0]:
        raise ValueError(f"x is {tuple(x.shape)}, but this layer takes [..., {rows_IO.shape[0]}]")
    for name, tensor in (("rows", rows_IO), ("bias", layer.bias_O), ("cut", layer.cut)):
        if tensor is not None and (tensor.device != x.device or tensor.dtype != x.dtype):
            raise ValueError(
                f"x is {x.dtype} on {x.device}, but {name} is {tensor.dtype} on {tensor.device}: convert one of them"
            )


@torch.library.custom_op("lte::sparse_linears", mutates_args=())
def _products(x: Tensor, rows: Sequence[Tensor], cuts: Sequence[Tensor | None]) -> Tensor:
    """Return the products with all matrices, side by side: the one call that ``torch.compile`` sees."""
    from lte.ops.triton_linear import products  # which needs Triton

    return products(x.contiguous(), rows, cuts)


@_products.register_fake
def _(x: Tensor, rows: Sequence[Tensor], _cuts: object) -> Tensor:
    return x.new_empty(x.shape[0], sum(one.shape[1] for one in rows))
