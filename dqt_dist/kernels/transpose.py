"""e4m3 codes transposed, for weight gradients.

    out [features, tokens] = (codes [tokens, features] * token_factor [tokens, 1])^T          factor at most 1

An fp8 product sums along the contiguous dimension of both operands, and a weight gradient sums over tokens. Without a
factor the codes are copied unchanged. Floor: one byte read and one byte written per code.
"""

from __future__ import annotations

import torch
from torch import Tensor


def transpose(codes: Tensor, token_factor: Tensor | None = None) -> Tensor:
    """Contiguous e4m3 [features, tokens]. With a factor the products are rounded to e4m3 once more."""
    assert codes.dtype == torch.float8_e4m3fn and codes.is_contiguous()
    if codes.is_cuda:
        from dqt_dist.kernels import transpose_triton

        return transpose_triton.transpose(codes, token_factor)
    if token_factor is None:
        return codes.view(torch.uint8).t().contiguous().view(torch.float8_e4m3fn)
    return (codes.float() * token_factor).t().contiguous().to(torch.float8_e4m3fn)
