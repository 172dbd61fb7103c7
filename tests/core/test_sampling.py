"""Strides over rows of values."""

import math

import pytest

from lte.core.sampling import stride_for


@pytest.mark.parametrize(("tokens", "width"), [(4096, 14336), (1060, 14336), (4096, 11008), (4096, 64), (7, 3)])
def test_every_place_of_a_row_has_its_turn(tokens, width):
    """14336 neurons, as of Llama-3-8B: every 58th would never be one of odd number."""
    stride = stride_for(tokens * width, 1 << 18, width)
    assert len({place % width for place in range(0, stride * width, stride)}) == width
    assert tokens * width / (1 << 18) - 1 < stride < tokens * width / (1 << 18) + 8


def test_rows_of_several_widths():
    assert stride_for(100, 10, 4, 15) == 11
    assert math.gcd(stride_for(1000, 10, 64, 7), 64 * 7) == 1
