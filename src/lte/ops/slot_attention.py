"""Attention in decoding: one query a row over the filled slots of a cache. Reference, and what a compiler sees."""

import torch
from torch import Tensor

MAX_WIDTH = 256
"""Of a head, in the kernels."""


def reference(q_BHD: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor, span_B2: Tensor, scaling: float) -> Tensor:
    """As :func:`slot_attention`, in PyTorch and at least fp32."""
    slots_S = torch.arange(keys_BKSD.shape[2], device=q_BHD.device)
    first_B, last_B = span_B2.unbind(-1)
    seen_BS = (slots_S >= first_B[:, None]) & (slots_S <= last_B[:, None])
    group = q_BHD.shape[1] // keys_BKSD.shape[1]
    least = torch.promote_types(q_BHD.dtype, torch.float32)
    keys, values = (one.to(least).repeat_interleave(group, 1) for one in (keys_BKSD, values_BKSD))
    score_BHS = torch.einsum("bhd,bhsd->bhs", q_BHD.to(keys.dtype), keys) * scaling
    share_BHS = score_BHS.masked_fill(~seen_BS[:, None], -torch.inf).softmax(-1)
    values = values.masked_fill(~seen_BS[:, None, :, None], 0)  # what is not seen may be anything
    return torch.einsum("bhs,bhsd->bhd", share_BHS, values).to(q_BHD.dtype)


@torch.library.custom_op("lte::slot_attention", mutates_args=())
def slot_attention(q: Tensor, keys: Tensor, values: Tensor, span: Tensor, scaling: float) -> Tensor:
    """Attention of one token a row.

    Args:
        q: queries ``[B, H, D]``, D at most 256.
        keys, values: ``[B, K, S, D]`` on the same device, in the same dtype; K divides H.
        span: int64 ``[B, 2]``: the first and the last slot that a row sees. Others are not read.
        scaling: of the scores.

    Returns:
        ``[B, H, D]``, in the queries' dtype.
    """
    from lte.ops.triton_attention import attention  # which needs Triton

    with torch.cuda.device_of(q):
        return attention(_rows(q), _rows(keys), _rows(values), span.contiguous(), scaling)


@slot_attention.register_fake
def _(q: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
