"""qkv taken apart and rotated in one pass: rotary position embedding (RoFormer, arXiv 2104.09864) as LLaMA applies it.

    angle(position, i) = position / base^(2 i / d)        i in 0 .. d/2 - 1
    y_i = x_i cos - x_(i + d/2) sin        y_(i + d/2) = x_(i + d/2) cos + x_i sin        halves, not neighbours

Megatron's qkv output is interleaved by query group: the query heads of a group, then its key head, then its value head.
Queries and keys are rotated in fp32 and rounded once; values are copied. The backward rotates by the negative angle and
writes to the same interleaved places. Floor: every element read once and written once. Triton on CUDA; elsewhere the
definitions in this file.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def angles(length: int, head: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [length, head / 2]."""
    inverse = 1.0 / base ** (torch.arange(0, head, 2, dtype=torch.float32, device=device) / head)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inverse)
    return angle.cos(), angle.sin()


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, mixed: Tensor, groups: int, cos: Tensor, sin: Tensor, batch_major: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        if mixed.is_cuda:
            from dqt_dist.kernels import rope_triton

            return rope_triton.split_and_rotate(mixed, groups, cos, sin, batch_major)
        s, b = mixed.shape[:2]
        head = 2 * cos.shape[1]
        per_group = mixed.view(s, b, groups, -1, head)
        q, k, v = per_group[..., :-2, :], per_group[..., -2, :], per_group[..., -1, :]
        q = q.reshape(s, b, -1, head)
        q, k, v = _rotated(q, cos, sin), _rotated(k, cos, sin), v.contiguous()
        if batch_major:
            q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
        return q, k, v

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        if dq.is_cuda:
            from dqt_dist.kernels import rope_triton

            return rope_triton.gather_rotated_back(dq, dk, dv, cos, sin), None, None, None, None
        s, b, groups, head = dk.shape
        dq = _rotated(dq, cos, -sin).view(s, b, groups, -1, head)
        dk = _rotated(dk, cos, -sin)
        return torch.cat([dq, dk.unsqueeze(3), dv.unsqueeze(3)], dim=3).view(s, b, -1), None, None, None, None


def split_and_rotate(
    mixed: Tensor, groups: int, cos: Tensor, sin: Tensor, batch_major: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q [s, b, heads, d] and k [s, b, groups, d], and v [s, b, groups, d], all contiguous.

    mixed: [s, b, groups * (heads / groups + 2) * d]; cos and sin: of positions 0 .. s - 1, see `angles`. batch_major:
    the results are [b, s, ..] in memory, for attention that takes samples one after the other.
    """
    return _SplitAndRotate.apply(mixed, groups, cos, sin, batch_major)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [s, b, n, d] turned by the angles of its positions."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, None, :], sin[:, None, None, :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
