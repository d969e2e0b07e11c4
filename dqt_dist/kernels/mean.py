"""The mean over ranks of one piece of a gradient, in rank order: Triton on CUDA, the definition elsewhere.

    mean = (((g_0 + g_1) + g_2) + ...) / ranks        in fp32, rounded once to the type of the parts

Floor: each part read once, the mean written once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_of_parts(parts: Tensor) -> Tensor:
    """Mean of `parts` [ranks, n], contiguous, fp32 or bf16, over the ranks: [n], in the type of the parts."""
    if parts.is_cuda and parts.numel() > 0:
        from dqt_dist.kernels import mean_triton

        return mean_triton.mean_of_parts(parts)
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    total /= parts.shape[0]
    return total.to(parts.dtype)
