"""Taking a part of many values evenly."""

import math


def stride_for(count: int, kept: int, *widths: int) -> int:
    """How far apart about ``kept`` of ``count`` values lie, in rows of ``widths`` one after the other.

    It shares no factor with a width, so that every place of a row has its turn: with one, some experts would never be
    seen.
    """
    stride = max(1, count // kept)
    while any(math.gcd(stride, width) > 1 for width in widths):
        stride += 1
    return stride
