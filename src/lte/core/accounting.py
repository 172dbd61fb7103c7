"""What a token costs: FLOPs and weight bytes of a sparse model, counted the paper's way.

A multiply-add is two FLOPs, "G" is 2^30, biases, norms, activations and attention scores are not
counted, and the LM head and the embeddings are kept apart (they do not depend on sparsity).
LLaMA-7B comes to 12.0625 G dense: 8.0625 in FFNs and 4.0 in attention projections.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

G = 2**30
COUNTED_AT_ONCE = 2**27  # pairs that count_active adds up at once: a gigabyte


@dataclass(frozen=True)
class Shape:
    """The weight counts of a model that decide its cost.

    Attributes:
        ffn_weights: weights of each layer's FFN (gate, up and down together).
        router_weights: weights of each layer's router, and of its compensation where it has one.
        attention_weights: weights of all attention projections together.
        head_weights: weights of the LM or classification head.
        embedding_weights: weights of the embeddings, not counting a head tied to them.
        selection_weights: of each layer's ``ffn_weights``, those multiplied for every neuron because a choice is made
            by what they give; empty where none are.
    """

    ffn_weights: tuple[int, ...]
    router_weights: tuple[int, ...]
    attention_weights: int
    head_weights: int = 0
    embedding_weights: int = 0
    selection_weights: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Cost of one token. FLOPs in G (2^30); ``gflops`` = FFN + attention + router, without the head.

    A compensation of idle experts counts with the router.
    """

    gflops: float
    ffn_gflops: float
    attention_gflops: float
    router_gflops: float
    head_gflops: float
    weight_bytes: int
    """Bytes of weights read to decode one token: active FFN, attention, router. Head and embedding apart."""
    head_bytes: int
    embedding_bytes: int
    """Bytes the embeddings hold; decoding a token reads one row."""


def cost(
    shape: Shape, sparsity: float | Sequence[float] = 0.0, router: bool | None = None, bytes_per_weight: float = 2
) -> Cost:
    """Cost of a token at a given FFN sparsity.

    Args:
        shape: the model's weight counts.
        sparsity: fraction of inactive neurons, one number or one a layer; 0 is dense.
        router: whether routers are charged. None charges them when anything is skipped: a dense
            model runs none.
        bytes_per_weight: 2 for bf16 and fp16, 4 for fp32.

    Raises:
        ValueError: a sparsity outside [0, 1], or not one a layer.
    """
    layers = len(shape.ffn_weights)
    by_layer = [float(sparsity)] * layers if isinstance(sparsity, int | float) else [float(s) for s in sparsity]
    if len(by_layer) != layers:
        raise ValueError(f"{len(by_layer)} sparsities for {layers} layers: give one number, or one a layer")
    if not all(0 <= s <= 1 for s in by_layer):
        raise ValueError(f"sparsity is {sparsity}, but it is a fraction between 0 (dense) and 1")
    if router is None:
        router = any(s > 0 for s in by_layer)
    always = shape.selection_weights or (0,) * layers
    ffn = sum(a + (w - a) * (1 - s) for w, a, s in zip(shape.ffn_weights, always, by_layer, strict=True))
    routers = sum(shape.router_weights) if router else 0
    counted = ffn + shape.attention_weights + routers
    return Cost(
        gflops=2 * counted / G,
        ffn_gflops=2 * ffn / G,
        attention_gflops=2 * shape.attention_weights / G,
        router_gflops=2 * routers / G,
        head_gflops=2 * shape.head_weights / G,
        weight_bytes=round(counted * bytes_per_weight),
        head_bytes=round(shape.head_weights * bytes_per_weight),
        embedding_bytes=round(shape.embedding_weights * bytes_per_weight),
    )


def count_active(active_LTE: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many (token, expert) pairs of each layer are active, and how many a layer has, padding left out.

    Args:
        active_LTE: True where an expert is active, layers first: ``[L, ..., E]``.
        mask: which tokens count (non-zero), of the shape between layers and experts.

    Returns:
        int64 on the tensor's device: active ``[L]``, total (scalar). Sparsity is ``1 - active / total``.
    """
    # PyTorch adds up booleans as a copy of int64, eight times their size: piece by piece where that is large
    tokens = max(1, COUNTED_AT_ONCE // (active_LTE.shape[0] * active_LTE.shape[-1]))
    pieces = active_LTE.flatten(1, -2).split(tokens, dim=1)
    active_LT = torch.cat([piece.sum(-1) for piece in pieces], dim=1)
    if mask is None:
        return active_LT.sum(-1), active_LT.new_full((), active_LTE[0].numel())  # torch.tensor() would wait for the GPU
    counted_T = mask.to(active_LTE.device).ne(0).flatten()
    return (active_LT * counted_T).sum(-1), counted_T.sum() * active_LTE.shape[-1]
