"""Sum of squares of a gradient, added up in fp64 without a copy in fp64: Triton on CUDA, torch's reduction elsewhere.

In fp64 the division of elements over ranks changes the sum by a fraction of 1e-16. Floor: each element read once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def square_sum(x: Tensor) -> Tensor:
    """Parts of the sum of squares of x, fp64 [n]; n is small. x is contiguous, fp32 or bf16, of any shape.

    The caller adds up the parts of many tensors at once.
    """
    if x.is_cuda and x.numel() > 0:
        from dqt_dist.kernels import square_sum_triton

        return square_sum_triton.square_sum(x)
    return torch.linalg.vector_norm(x, dtype=torch.float64).square().view(1)
