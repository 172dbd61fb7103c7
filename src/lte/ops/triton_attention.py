"""Attention of one query a row over a cache, reading only the slots that are filled. Two launches.

1. ``_parts``: a head's slots are cut among programs; each gives the softmax-weighted sum of its part, unscaled.
2. ``_whole``: the parts of a head, put together in a fixed order, so that every run gives the same bits.

Both cut the work by numbers on the device, so a CUDA graph follows the texts as they grow. Queries that share a head of
keys are computed together.
"""
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.ops.triton_device import device_info

_LOT = 16384
"""Bytes of keys that a program looks at together."""


@triton.jit
def _parts(
    q,
    keys,
    values,
    span,
    sums,
    tops,
    totals,
    scaling,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    KV,
    D,
    G: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    head, part = tl.program_id(0), tl.program_id(1)
    b, kv = head // KV, head % KV
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    first, last = tl.load(span + 2 * b), tl.load(span + 2 * b + 1)
    share = tl.cdiv(tl.cdiv(last + 1 - first, PARTS), BLOCK_S) * BLOCK_S
    begin = first + part * share
    end = tl.minimum(begin + share, last + 1)
    d_D = tl.arange(0, BLOCK_D)
    g_G = tl.arange(0, BLOCK_G)
    inside_GD = (g_G < G)[:, None] & (d_D < D)[None, :]
    q_GD = tl.load(q + b * stride_qb + (kv * G + g_G)[:, None] * stride_qh + d_D[None, :], mask=inside_GD, other=0.0)
    top_G = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total_G = tl.zeros([BLOCK_G], tl.float32)
    sum_GD = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    keys += b * stride_kb + kv * stride_kh
    values += b * stride_vb + kv * stride_vh
    for slot in range(begin, end, BLOCK_S):
        slots_S = slot + tl.arange(0, BLOCK_S)
        inside_SD = (slots_S < end)[:, None] & (d_D < D)[None, :]
        k_SD = tl.load(keys + slots_S[:, None] * stride_ks + d_D[None, :], mask=inside_SD, other=0.0)
        v_SD = tl.load(values + slots_S[:, None] * stride_vs + d_D[None, :], mask=inside_SD, other=0.0)
        if BLOCK_G == 1:
            score_GS = tl.sum(k_SD.to(tl.float32) * q_GD.to(tl.float32), axis=1)[None, :]
        else:
            score_GS = tl.dot(q_GD, tl.trans(k_SD), input_precision="ieee")
        score_GS = tl.where((slots_S < end)[None, :], score_GS * scaling, -float("inf"))
        new_G = tl.maximum(top_G, tl.max(score_GS, axis=1))
        keep_G = tl.exp(top_G - new_G)
        p_GS = tl.exp(score_GS - new_G[:, None])
        total_G = total_G * keep_G + tl.sum(p_GS, axis=1)
        if BLOCK_G == 1:
            gain_GD = tl.sum(tl.trans(p_GS) * v_SD.to(tl.float32), axis=0)[None, :]
        else:
            gain_GD = tl.dot(p_GS.to(v_SD.dtype), v_SD, input_precision="ieee")
        sum_GD = sum_GD * keep_G[:, None] + gain_GD
        top_G = new_G
    at_G = (head * G + g_G) * PARTS + part
    tl.store(tops + at_G, top_G, mask=g_G < G)
    tl.store(totals + at_G, total_G, mask=g_G < G)
    tl.store(sums + at_G[:, None] * D + d_D[None, :], sum_GD, mask=inside_GD)


@triton.jit
def _whole(sums, tops, totals, y, D, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr):
    head = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    parts_P, d_D = tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    top_P = tl.load(tops + head * PARTS + parts_P)
    weight_P = tl.exp(top_P - tl.max(top_P, axis=0))  # 0 for a part without slots
    total = tl.sum(tl.load(totals + head * PARTS + parts_P) * weight_P, axis=0)
    at_PD = (head * PARTS + parts_P)[:, None] * D + d_D[None, :]
    sum_PD = tl.load(sums + at_PD, mask=(d_D < D)[None, :], other=0.0)
    tl.store(y + head * D + d_D, tl.sum(sum_PD * (weight_P / total)[:, None], axis=0), mask=d_D < D)


def attention(q_BHD: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor, span_B2: Tensor, scaling: float) -> Tensor:
    """As :func:`lte.ops.slot_attention.slot_attention`."""
    B, H, D = q_BHD.shape
    KV, slots = keys_BKSD.shape[1:3]
    device, group = q_BHD.device, H // KV
    info = device_info(device)
    block_d = max(16, triton.next_power_of_2(D))
    block_s = max(16, min(64, _LOT // (block_d * keys_BKSD.dtype.itemsize)))
    wanted = max(1, 2 * info.multiprocessors // (B * KV))  # two programs a multiprocessor
    parts = min(triton.next_power_of_2(wanted), triton.next_power_of_2(triton.cdiv(slots, block_s)), 32)
    sums = torch.empty(B * H, parts, D, dtype=torch.float32, device=device)
    tops, totals = torch.empty(2, B * H, parts, dtype=torch.float32, device=device)
    y_BHD = torch.empty(B, H, D, dtype=q_BHD.dtype, device=device)
    _parts[(B * KV, parts)](
        q_BHD,
        keys_BKSD,
        values_BKSD,
        span_B2,
        sums,
        tops,
        totals,
        scaling,
        *q_BHD.stride()[:2],
        *keys_BKSD.stride()[:3],
        *values_BKSD.stride()[:3],
        KV,
        D,
        G=group,
        BLOCK_G=1 if group == 1 else max(16, triton.next_power_of_2(group)),
        BLOCK_D=block_d,
        BLOCK_S=block_s,
        PARTS=parts,
        num_warps=4,
        num_stages=2,
        **info.overlap,
    )
    _whole[(B * H,)](sums, tops, totals, y_BHD, D, BLOCK_D=block_d, PARTS=parts, num_warps=2, **info.overlap)
    return y_BHD
