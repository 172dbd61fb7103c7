"""Parity: a check that a backend computes the same as the reference, on the tensors that are to be timed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lte.ops import reference
from lte.ops.sparse_ffn import BackendName, sparse_ffn
from lte.ops.weights import FFNWeights

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
_AMBIGUOUS = 2e-5  # rounding may move a logit so close to the threshold to its other side


def parity(x_LTD: Tensor | Sequence[Tensor], layers: Sequence[FFNWeights], backend: BackendName) -> str | None:
    """Return an error of the backend on the first and the last copy, or None.

    A token with a logit at the threshold is compared with a given choice of experts, because rounding may decide it
    either way.
    """
    for index in sorted({0, len(layers) - 1}):
        x_TD, weights = x_LTD[index], layers[index]
        logits_TE = reference.logits(x_TD, weights.router)
        clear_T = ((logits_TE - weights.router.threshold).abs() > _AMBIGUOUS).all(-1)
        active_TE = reference.route(x_TD, weights.router)
        pairs = [(sparse_ffn(x_TD, weights, active_TE, backend), reference.sparse_ffn(x_TD, weights, active_TE))]
        if clear_T.any():
            pairs.append((sparse_ffn(x_TD, weights, None, backend)[clear_T], pairs[0][1][clear_T]))
        for found, expected in pairs:
            error = relative_rms(found, expected)
            if not error <= TOLERANCE[x_TD.dtype]:
                return f"parity red: relative RMS error {error:.3g} against the reference (copy {index})"
    return None


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """Return the relative RMS error, or the norm of ``found`` if ``expected`` is 0."""
    norm = expected.float().norm()
    return float((found.float() - expected.float()).norm() / (norm if norm > 0 else 1))
