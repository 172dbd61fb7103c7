"""The code that :mod:`lte.ops.cpu` runs, compiled by Numba."""
