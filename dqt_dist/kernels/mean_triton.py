# pyright: reportMissingImports=false, reportIndexIssue=false
"""Triton form of `mean.py`: each program has one block of elements of all parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqt_dist.kernels.launch import launch

BLOCK = 4096


@triton.jit
def _combine_kernel(parts, result, numel, RANKS: tl.constexpr, DIVIDE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    total = tl.load(parts + offsets, mask=inside).to(tl.float32)
    for _ in range(1, RANKS):
        parts += numel
        total += tl.load(parts + offsets, mask=inside).to(tl.float32)
    if DIVIDE:
        # An ordinary division is an approximation on a GPU.
        total = tl.div_rn(total, RANKS * 1.0)
    tl.store(result + offsets, total.to(result.dtype.element_ty), mask=inside)


def combined(parts: Tensor, divide: bool) -> Tensor:
    """`mean_of_parts` or, without `divide`, `sum_of_parts` of mean.py."""
    assert parts.is_contiguous()
    ranks, numel = parts.shape
    result = torch.empty(numel, dtype=parts.dtype, device=parts.device)
    grid = (int(triton.cdiv(numel, BLOCK)),)
    launch(_combine_kernel, grid, parts, result, numel, RANKS=ranks, DIVIDE=divide, BLOCK=BLOCK, num_warps=8)
    return result
