"""Makes an int8 or int4 :class:`Matrix` of floats: symmetric, each number rounded to the nearest."""

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lte.ops.weights import INT4_GROUP, Affine, FFNWeights, Matrix

Quantised = Literal["int8", "int4"]
QUANTISED = get_args(Quantised)

_CLIPS = tuple(1 - i / 40 for i in range(17))
"""The parts of a group's largest number that are tried as the end of its range."""


@torch.no_grad()
def quantise(rows_RD: Tensor, to: Quantised, transposed: bool = False) -> Matrix:
    """Return a matrix that stands for these floats. Its scales have their dtype. On the meta device it has no numbers.

    Args:
        to: the form.
        transposed: whether columns are the outputs of the projection, as in a down projection. Else rows are. Int8 has
            a scale for each output. With a scale for each neuron of a down projection, one large weight would round
            the others of its neuron away, and models have such weights (docs/quantisation.md).

    Raises:
        ValueError: int4 and an odd number of columns, or rows that are no multiple of 32. NaN or infinity.
    """
    if not rows_RD.is_meta and not bool(rows_RD.isfinite().all()):
        raise ValueError("weights with NaN or infinity cannot be quantised: the model is damaged, load it again")
    return _int8(rows_RD, transposed) if to == "int8" else _int4(rows_RD)


def quantise_ffn(weights: FFNWeights, to: Quantised, router: bool = True) -> FFNWeights:
    """Return the FFN with quantised experts, and with a router in int8 if ``router``. Biases and compensation stay."""

    def stored(part: Affine, transposed: bool = False) -> Affine:
        return replace(part, matrix=quantise(part.matrix.rows, to, transposed))

    routed = replace(weights.router, matrix=quantise(weights.router.matrix.rows, "int8")) if router else weights.router
    gate = None if weights.gate is None else stored(weights.gate)
    return replace(weights, up=stored(weights.up), down=stored(weights.down, transposed=True), gate=gate, router=routed)


def _int8(rows_RD: Tensor, transposed: bool) -> Matrix:
    scales = (rows_RD.float().abs().amax(0 if transposed else 1, keepdim=True) / 127).to(rows_RD.dtype)
    numbers_RD = nearest(rows_RD.float(), scales.float(), -127, 127)
    return Matrix(numbers_RD.to(torch.int8).contiguous(), scales if transposed else scales[:, 0].contiguous())


def _int4(rows_RD: Tensor) -> Matrix:
    (R, D), dtype = rows_RD.shape, rows_RD.dtype
    if R % INT4_GROUP or D % 2:
        raise ValueError(
            f"a matrix of {R} x {D} cannot be int4: its rows must be a multiple of {INT4_GROUP} and its columns even, "
            "take int8"
        )
    groups_GND = rows_RD.float().unflatten(0, (-1, INT4_GROUP))
    scales_GD = int4_scales(groups_GND, dtype)
    return pack_int4(nearest(groups_GND, scales_GD.float()[:, None], -8, 7).flatten(0, 1), scales_GD)


def int4_scales(groups_GND: Tensor, dtype: torch.dtype, importance_GN1: Tensor | None = None) -> Tensor:
    """Return ``[G, D]``, for each group and column the scale of the least squared error, among a few.

    A scale may be negative: the number of the largest magnitude becomes -8, because 8 does not exist. The squared error
    of a row counts ``importance_GN1`` times.
    """
    peak_G1D = groups_GND.gather(1, groups_GND.abs().argmax(1, keepdim=True))
    best_G1D, least_G1D = peak_G1D, torch.full_like(peak_G1D, torch.inf)
    for clip in _CLIPS:
        scales_G1D = (peak_G1D * (clip / -8)).to(dtype).float()
        error_GND = (nearest(groups_GND, scales_G1D, -8, 7) * scales_G1D - groups_GND).square()
        if importance_GN1 is not None:
            error_GND = error_GND * importance_GN1
        error_G1D = error_GND.sum(1, keepdim=True)
        best_G1D = torch.where(error_G1D < least_G1D, scales_G1D, best_G1D)
        least_G1D = torch.minimum(error_G1D, least_G1D)
    return best_G1D[:, 0].to(dtype)


def pack_int4(numbers_RD: Tensor, scales_GD: Tensor) -> Matrix:
    """Return the matrix of whole numbers from -8 to 7, as :class:`Matrix` stores them."""
    low, high = (numbers_RD + 8).to(torch.uint8).chunk(2, dim=1)
    return Matrix((low | high << 4).contiguous(), scales_GD.contiguous())


def nearest(values: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """Return the whole number of each value. All values of scale 0 are 0, or nearly."""
    return (values / torch.where(scales == 0, 1, scales)).round().clamp(low, high)
