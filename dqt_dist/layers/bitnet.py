"""BitNet b1.58 as a baseline: a float master weight, ternarised in every forward, straight-through in the backward.

    s = mean|W| over the logical matrix       W_q = clamp(round(W / s), -1, 1) * s       (arXiv 2402.17764, eq. 1 to 3)
    y = quantize_8_bit(x) @ W_q^T             dW and dx pass both roundings unchanged

Megatron's own parallel linears compute the product; only their operands are replaced, on the way into `_forward_impl`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from dqt_dist.lowbit.activation import quantize_tokens, token_absmax
from dqt_dist.lowbit.coordinates import ShardLayout
from dqt_dist.lowbit.scale import BITNET_SCALE_FLOOR
from dqt_dist.parallel.collectives import Group, reduce_in_place


class _StraightThrough(torch.autograd.Function):
    """`quantized` forward, the gradient to x backward.

    The usual x + (quantized - x).detach() rounds twice and lands beside the grid: the weights would not be ternary.
    """

    @staticmethod
    def forward(ctx, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@lru_cache(maxsize=512)
def _matrices_of_rows(layout: ShardLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrix of each row and weights of each matrix, on `device`: a copy made in every forward would wait for the device."""
    numel = torch.tensor([m.rows * m.columns for m in layout.matrices], device=device)
    return layout.row_matrix().to(device), numel


def ternarize(weight: Tensor, layout: ShardLayout, group: Group) -> Tensor:
    """Fake-quantised `weight` [rows, columns] of a shard; the scale is the mean over each whole logical matrix."""
    row_matrix, numel = _matrices_of_rows(layout, weight.device)
    with torch.no_grad():
        wide = weight.float()
        abs_sum = torch.zeros(len(layout.matrices), device=weight.device)
        abs_sum.index_add_(0, row_matrix, wide.abs().sum(dim=1))
        reduce_in_place(abs_sum, group, "activations")
        scale = (abs_sum / numel).clamp(min=BITNET_SCALE_FLOOR)[row_matrix][:, None]
        quantized = (wide / scale).round().clamp(-1, 1) * scale
    return _StraightThrough.apply(weight, quantized)


def fake_quantize_tokens(x: Tensor, width_group: Group | None = None) -> Tensor:
    """x rounded to 8 bits a token over the full width, which `width_group` splits; straight-through."""
    with torch.no_grad():
        absmax = token_absmax(x)
        if width_group is not None:
            reduce_in_place(absmax, width_group, "activation_maxima", op=dist.ReduceOp.MAX)
        codes, scale = quantize_tokens(x, absmax)
        quantized = codes * scale
    return _StraightThrough.apply(x, quantized)


class _BitNetOperands:
    """Mixin: replaces the operands of Megatron's product by their quantised forms."""

    layout: ShardLayout
    """Set when the model is built: which logical matrices this shard belongs to."""
    splits_width: bool

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        group = self.tp_group
        if self.config.quantization.activation == "int8":
            input = fake_quantize_tokens(input, group if self.splits_width else None)
        return super()._forward_impl(input, ternarize(weight, self.layout, group), *args, **kwargs)


class ColumnParallelBitLinear(_BitNetOperands, ColumnParallelLinear):
    """qkv and gate|up of a BitNet b1.58 model."""

    splits_width = False


class RowParallelBitLinear(_BitNetOperands, RowParallelLinear):
    """o_proj and down_proj of a BitNet b1.58 model."""

    splits_width = True
