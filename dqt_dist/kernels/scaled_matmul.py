"""fp8 product with a scale for each row of both operands: torch's on CUDA (compute capability 8.9 or newer), elsewhere in fp32.

    out [m, n] = (a [m, k] @ b [n, k]^T) * a_scale [m, 1] * b_scale [n]           a, b e4m3; scales fp32; out bf16

Both operands are contiguous along k, which tensor cores sum over. On an H200 it reaches 1330 TFLOP/s where bf16 reaches 670.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def ones(size: int, device: torch.device) -> Tensor:
    """Scales of an operand that has none, fp32 [size]."""
    return torch.ones(size, device=device)


def scaled_matmul(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor | None = None) -> Tensor:
    """Both dimensions of b and k must be multiples of 16 on CUDA."""
    if b_scale is None:
        b_scale = ones(b.shape[0], b.device)
    if a.is_cuda:
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            a, b.t(), a_scale.view(-1, 1), b_scale.view(1, -1), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return ((a.float() @ b.float().t()) * a_scale.view(-1, 1) * b_scale).to(torch.bfloat16)
