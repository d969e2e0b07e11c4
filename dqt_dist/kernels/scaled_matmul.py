"""fp8 product with a scale for each row of both operands.

    out [m, n] = (a [m, k] @ b [n, k]^T) * a_scale [m, 1] * b_scale [n]           a, b e4m3; scales fp32; out bf16

On CUDA torch computes this product, on compute capability 8.9 or newer; elsewhere the product is computed in fp32. Both
operands are contiguous along k, the dimension that tensor cores sum over. An H200 reaches 1330 TFLOP/s in fp8 and 670
TFLOP/s in bf16.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def ones(size: int, device: torch.device) -> Tensor:
    """Scales of an operand that has none, fp32 [size]."""
    return torch.ones(size, device=device)


def scaled_matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """On CUDA, n and k must be multiples of 16. `out`: contiguous, bf16."""
    if b_scale is None:
        b_scale = ones(b.shape[0], b.device)
    if a.is_cuda:
        memory = {} if out is None else {"out": out}
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            a, b.t(), a_scale.view(-1, 1), b_scale.view(1, -1), out_dtype=torch.bfloat16, use_fast_accum=True, **memory
        )
    product = ((a.float() @ b.float().t()) * a_scale.view(-1, 1) * b_scale).to(torch.bfloat16)
    return product if out is None else out.copy_(product)
