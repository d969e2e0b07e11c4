# pyright: reportMissingImports=false, reportIndexIssue=false
"""Triton form of `square_sum.py`: one partial sum per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqt_dist.kernels.launch import launch

# Elements of a program, and of one of its loads.
CHUNK, BLOCK = 1 << 17, 4096


@triton.jit
def _square_sum_kernel(x, parts, numel, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, CHUNK, BLOCK):
        offsets = program * CHUNK + start + tl.arange(0, BLOCK)
        value = tl.load(x + offsets, mask=offsets < numel, other=0.0).to(tl.float32).to(tl.float64)
        total += value * value
    tl.store(parts + program, tl.sum(total))


def square_sum(x: Tensor) -> Tensor:
    """See square_sum.py."""
    assert x.is_contiguous()
    parts = torch.empty(int(triton.cdiv(x.numel(), CHUNK)), dtype=torch.float64, device=x.device)
    launch(_square_sum_kernel, (parts.numel(),), x, parts, x.numel(), CHUNK=CHUNK, BLOCK=BLOCK, num_warps=8)
    return parts
