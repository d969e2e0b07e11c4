"""The sum or the mean over ranks of the parts that they sent, in rank order: Triton on CUDA, the definition elsewhere.

    sum  = ((g_0 + g_1) + g_2) + ...                  in fp32, rounded once to the type of the parts
    mean = (((g_0 + g_1) + g_2) + ...) / ranks        the same

Floor: each part read once, the result written once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_of_parts(parts: Tensor) -> Tensor:
    """Mean of `parts` [ranks, n], contiguous, fp32 or bf16, over the ranks: [n], in the type of the parts."""
    return _combined(parts, divide=True)


def sum_of_parts(parts: Tensor) -> Tensor:
    """Sum of `parts` [ranks, n], contiguous, fp32, bf16 or int32, over the ranks: [n], in the type of the parts."""
    if parts.dtype == torch.int32:
        return parts.sum(0, dtype=torch.int32)
    return _combined(parts, divide=False)


def _combined(parts: Tensor, divide: bool) -> Tensor:
    if parts.is_cuda and parts.numel() > 0:
        from dqt_dist.kernels import mean_triton

        return mean_triton.combined(parts, divide)
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    if divide:
        total /= parts.shape[0]
    return total.to(parts.dtype)
