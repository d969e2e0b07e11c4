"""Sums of squares over the rows and over the columns of a gradient, as exact integers: Triton on CUDA, torch elsewhere.

An integer sum has the same bits in every order, so parts of a matrix may lie on any ranks. Floor: the gradient read
once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exact_square_sums(gradient: Tensor, scale: Tensor, row_matrix: Tensor, num_matrices: int) -> tuple[Tensor, Tensor]:
    """The sums of q = trunc((g * scale)^2), int64: over columns, [rows], and over rows, [matrices, columns].

    gradient is fp32 or bf16 [rows, columns], contiguous. scale is an fp32 scalar on the same device, for which all q
    together stay below 2^63; where scale is 0 no g is looked at and every sum is 0. row_matrix [rows] is the index of
    the matrix that a row belongs to.
    """
    if gradient.is_cuda and gradient.numel() > 0:
        from dqt_dist.kernels import exact_square_sums_triton

        return exact_square_sums_triton.exact_square_sums(gradient, scale, row_matrix, num_matrices)
    scaled = torch.where(scale > 0, gradient.float() * scale, 0.0)
    squares = scaled.square().to(torch.int64)
    column_sums = squares.new_zeros(num_matrices, gradient.shape[1])
    column_sums.index_add_(0, row_matrix.long(), squares)
    return squares.sum(dim=1), column_sums
