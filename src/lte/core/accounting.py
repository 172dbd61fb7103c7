"""What a token costs: FLOPs and weight bytes of a sparse model, counted the paper's way.

A multiply-add is two FLOPs, and "G" is 2^30. Biases, norms, activations and attention scores are not
counted. The LM head and the embeddings do not depend on sparsity and are kept apart.
LLaMA-7B has 12.0625 G dense: 8.0625 in FFNs and 4.0 in attention projections.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

G = 2**30
COUNTED_AT_ONCE = 2**27  # pairs that count_active sums at once: a gigabyte


@dataclass(frozen=True)
class Shape:
    """The weight counts of a model that decide its cost.

    Attributes:
        ffn_weights: weights of each layer's FFN (gate, up and down together).
        router_weights: weights of each layer's router, and of its compensation where it has one.
        attention_weights: weights of all attention projections together.
        head_weights: weights of the LM or classification head.
        embedding_weights: weights of the embeddings, not counting a head tied to them.
        selection_weights: the part of each layer's ``ffn_weights`` that is computed for every neuron, because the
            choice of neurons needs its result; empty if there is none.
        ffn_bytes, attention_bytes: bytes of a stored weight with its share of scales, where these weights are
            quantised; None if they are not.
    """

    ffn_weights: tuple[int, ...]
    router_weights: tuple[int, ...]
    attention_weights: int
    head_weights: int = 0
    embedding_weights: int = 0
    selection_weights: tuple[int, ...] = ()
    ffn_bytes: float | None = None
    attention_bytes: float | None = None


@dataclass(frozen=True)
class Cost:
    """Cost of one token. FLOPs are in G (2^30). ``gflops`` = FFN + attention + router, without the head.

    The compensation of idle experts counts as a part of the router.
    """

    gflops: float
    ffn_gflops: float
    attention_gflops: float
    router_gflops: float
    head_gflops: float
    weight_bytes: int
    """Bytes of weights that decoding one token reads: active FFN, attention, router. Without head and embedding."""
    head_bytes: int
    embedding_bytes: int
    """Bytes of the embeddings. Decoding a token reads one row of them."""


def cost(
    shape: Shape,
    sparsity: float | Sequence[float] = 0.0,
    router: bool | None = None,
    bytes_per_weight: float = 2,
    attention_sparsity: float = 0.0,
) -> Cost:
    """Return the cost of a token at a given sparsity.

    Args:
        shape: the model's weight counts.
        sparsity: fraction of inactive neurons, one number or one for each layer; 0 is dense.
        router: whether routers are charged. None charges them if the sparsity of any layer is above 0: a dense
            model runs no routers.
        bytes_per_weight: 2 for bf16 and fp16, 4 for fp32. Quantised weights count as the shape says.
        attention_sparsity: fraction of the attention projections' weights that zeros among inputs leave unread.

    Raises:
        ValueError: a sparsity outside [0, 1], or a wrong number of sparsities.
    """
    layers = len(shape.ffn_weights)
    by_layer = [float(sparsity)] * layers if isinstance(sparsity, int | float) else [float(s) for s in sparsity]
    if len(by_layer) != layers:
        raise ValueError(f"{len(by_layer)} sparsities for {layers} layers: give one number, or one for each layer")
    if not all(0 <= s <= 1 for s in by_layer):
        raise ValueError(f"sparsity is {sparsity}, but it is a fraction between 0 (dense) and 1")
    if not 0 <= attention_sparsity <= 1:
        raise ValueError(f"attention_sparsity is {attention_sparsity}, but it is a fraction between 0 (dense) and 1")
    if router is None:
        router = any(s > 0 for s in by_layer)
    always = shape.selection_weights or (0,) * layers
    ffn = sum(a + (w - a) * (1 - s) for w, a, s in zip(shape.ffn_weights, always, by_layer, strict=True))
    routers = sum(shape.router_weights) if router else 0
    attention = shape.attention_weights * (1 - attention_sparsity)
    counted = ffn + attention + routers
    in_ffn = bytes_per_weight if shape.ffn_bytes is None else shape.ffn_bytes
    in_attention = bytes_per_weight if shape.attention_bytes is None else shape.attention_bytes
    return Cost(
        gflops=2 * counted / G,
        ffn_gflops=2 * ffn / G,
        attention_gflops=2 * attention / G,
        router_gflops=2 * routers / G,
        head_gflops=2 * shape.head_weights / G,
        weight_bytes=round(ffn * in_ffn + attention * in_attention + routers * bytes_per_weight),
        head_bytes=round(shape.head_weights * bytes_per_weight),
        embedding_bytes=round(shape.embedding_weights * bytes_per_weight),
    )


def count_active(active_LTE: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Count the active (token, expert) pairs of each layer, and all pairs of a layer. Padding does not count.

    Args:
        active_LTE: True where an expert is active, layers first: ``[L, ..., E]``.
        mask: which tokens count (non-zero), of the shape between layers and experts.

    Returns:
        int64 on the tensor's device: active ``[L]``, total (scalar). Sparsity is ``1 - active / total``.
    """
    # PyTorch sums booleans through a copy in int64, eight times their size: a large tensor is summed in pieces
    tokens = max(1, COUNTED_AT_ONCE // (active_LTE.shape[0] * active_LTE.shape[-1]))
    pieces = active_LTE.flatten(1, -2).split(tokens, dim=1)
    active_LT = torch.cat([piece.sum(-1) for piece in pieces], dim=1)
    if mask is None:
        return active_LT.sum(-1), active_LT.new_full((), active_LTE[0].numel())  # torch.tensor() would wait for the GPU
    counted_T = mask.to(active_LTE.device).ne(0).flatten()
    return (active_LT * counted_T).sum(-1), counted_T.sum() * active_LTE.shape[-1]
