"""How to take an even sample of many values."""

import math


def stride_for(count: int, kept: int, *widths: int) -> int:
    """Return the distance between samples, so that about ``kept`` of ``count`` values are taken.

    The values are rows of ``widths``, one after the other. The distance has no common factor with a width, so that
    every place of a row is sampled. Otherwise some experts would never be seen.
    """
    stride = max(1, count // kept)
    while any(math.gcd(stride, width) > 1 for width in widths):
        stride += 1
    return stride
