# pyright: reportMissingImports=false, reportIndexIssue=false
"""Triton forms of `rope.py`: one program per token, in blocks of heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqt_dist.kernels.launch import launch

# Heads handled at once. With heads of 128 and 4 warps, a thread holds 8 pairs.
HEADS = 16


@triton.jit
def _rope_kernel(
    mixed,
    q,
    k,
    v,
    cos,
    sin,
    batch,
    queries,
    heads,
    half,
    q_s,
    q_b,
    q_h,
    k_s,
    k_b,
    k_h,
    v_s,
    v_b,
    v_h,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Forward: mixed -> q, k, v. Backward: q, k, v -> mixed.

    queries: query heads per group. heads: all heads of mixed, groups * (queries + 2). half: half the width of a head.
    q_s, q_b, q_h and so on: strides of sequence, batch and head, in elements.
    """
    token = tl.program_id(0)
    position = (token // batch).to(tl.int64)
    sample = (token % batch).to(tl.int64)
    i = tl.arange(0, HALF)
    c = tl.load(cos + position * half + i, mask=i < half, other=0.0)[None, :]
    s = tl.load(sin + position * half + i, mask=i < half, other=0.0)[None, :]
    if BACKWARD:
        s = -s
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        group = head // (queries + 2)
        part = head % (queries + 2)
        inside = (head < heads)[:, None] & (i < half)[None, :]
        is_q = inside & (part < queries)[:, None]
        is_k = inside & (part == queries)[:, None]
        is_v = inside & (part == queries + 1)[:, None]
        at_mixed = mixed + (token.to(tl.int64) * heads + head[:, None]) * (2 * half) + i[None, :]
        at_q = q + position * q_s + sample * q_b + (group * queries + part)[:, None] * q_h + i[None, :]
        at_k = k + position * k_s + sample * k_b + group[:, None] * k_h + i[None, :]
        at_v = v + position * v_s + sample * v_b + group[:, None] * v_h + i[None, :]
        if BACKWARD:
            first = tl.load(at_q, mask=is_q, other=0.0).to(tl.float32)
            first += tl.load(at_k, mask=is_k, other=0.0).to(tl.float32)
            first += tl.load(at_v, mask=is_v, other=0.0).to(tl.float32)
            second = tl.load(at_q + half, mask=is_q, other=0.0).to(tl.float32)
            second += tl.load(at_k + half, mask=is_k, other=0.0).to(tl.float32)
            second += tl.load(at_v + half, mask=is_v, other=0.0).to(tl.float32)
        else:
            first = tl.load(at_mixed, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(at_mixed + half, mask=inside, other=0.0).to(tl.float32)
        turned = tl.where(is_v, first, first * c - second * s).to(mixed.dtype.element_ty)
        turned_second = tl.where(is_v, second, second * c + first * s).to(mixed.dtype.element_ty)
        if BACKWARD:
            tl.store(at_mixed, turned, mask=inside)
            tl.store(at_mixed + half, turned_second, mask=inside)
        else:
            tl.store(at_q, turned, mask=is_q)
            tl.store(at_q + half, turned_second, mask=is_q)
            tl.store(at_k, turned, mask=is_k)
            tl.store(at_k + half, turned_second, mask=is_k)
            tl.store(at_v, turned, mask=is_v)
            tl.store(at_v + half, turned_second, mask=is_v)


def _launch(mixed: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    s, b, groups, _ = k.shape
    half = cos.shape[1]
    assert mixed.is_contiguous() and all(t.stride(3) == 1 for t in (q, k, v))
    queries = q.shape[2] // groups
    launch(
        _rope_kernel,
        (s * b,),
        mixed,
        q,
        k,
        v,
        cos,
        sin,
        b,
        queries,
        groups * (queries + 2),
        half,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        BACKWARD=backward,
        HEADS=HEADS,
        HALF=triton.next_power_of_2(half),
    )


def split_and_rotate(
    mixed: Tensor, groups: int, cos: Tensor, sin: Tensor, batch_major: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See rope.py."""
    mixed = mixed.contiguous()
    s, b, width = mixed.shape
    head = 2 * cos.shape[1]
    queries = width // head // groups - 2
    outer = (b, s) if batch_major else (s, b)
    q, k, v = (
        torch.empty(*outer, heads, head, dtype=mixed.dtype, device=mixed.device)
        for heads in (groups * queries, groups, groups)
    )
    if batch_major:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    _launch(mixed, q, k, v, cos, sin, backward=False)
    return q, k, v


def gather_rotated_back(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of mixed."""
    dq, dk, dv = (t if t.stride(3) == 1 else t.contiguous() for t in (dq, dk, dv))
    s, b, groups, head = dk.shape
    mixed = torch.empty(s, b, (dq.shape[2] + 2 * groups) * head, dtype=dq.dtype, device=dq.device)
    _launch(mixed, dq, dk, dv, cos, sin, backward=True)
    return mixed
