"""Sum of squares of a gradient, added up in fp64 without a copy in fp64: Triton on CUDA, torch's reduction elsewhere.

In fp64 the way elements are divided over ranks moves the sum by 1e-16 of itself. Floor: each element read once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def square_sum(x: Tensor) -> Tensor:
    """fp64 [n] that add up to it, of a contiguous fp32 or bf16 tensor of any shape: few, so that many tensors take one last sum."""
    if x.is_cuda and x.numel() > 0:
        from dqt_dist.kernels import square_sum_triton

        return square_sum_triton.square_sum(x)
    return torch.linalg.vector_norm(x, dtype=torch.float64).square().view(1)
