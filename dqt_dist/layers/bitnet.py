"""BitNet b1.58 as a baseline: a float master weight, ternarised in every forward, with a straight-through backward.

    s = mean|W| over the logical matrix       W_q = clamp(round(W / s), -1, 1) * s       (arXiv 2402.17764, eq. 1 to 3)
    y = quantize_8_bit(x) @ W_q^T             dW and dx pass the two roundings unchanged

Megatron's own parallel linears compute the product. Only the operands are replaced, at the entry of `_forward_impl`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from dqt_dist.layers.transformer_config import LlamaTransformerConfig
from dqt_dist.lowbit.activation import quantize_tokens, token_absmax
from dqt_dist.lowbit.coordinates import ShardLayout
from dqt_dist.lowbit.scale import BITNET_SCALE_FLOOR
from dqt_dist.parallel.collectives import Group, reduce_in_place


class _StraightThrough(torch.autograd.Function):
    """Forward: returns `quantized`. Backward: passes the gradient to x.

    The usual x + (quantized - x).detach() rounds twice and ends beside the grid: the weights would not be ternary.
    """

    @staticmethod
    def forward(ctx, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@lru_cache(maxsize=512)
def _matrices_of_rows(layout: ShardLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index of the matrix of each row and number of weights of each matrix, on `device`.

    Cached, because a copy to the device in every forward would wait for the device.
    """
    numel = torch.tensor([m.rows * m.columns for m in layout.matrices], device=device)
    return layout.row_matrix().to(device), numel


def ternarize(weight: Tensor, layout: ShardLayout, group: Group) -> Tensor:
    """Fake-quantised `weight` [rows, columns] of a shard. The scale is mean|W| over each whole logical matrix."""
    row_matrix, numel = _matrices_of_rows(layout, weight.device)
    with torch.no_grad():
        weight_fp32 = weight.float()
        abs_sum = torch.zeros(len(layout.matrices), device=weight.device)
        abs_sum.index_add_(0, row_matrix, weight_fp32.abs().sum(dim=1))
        reduce_in_place(abs_sum, group, "activations")
        scale = (abs_sum / numel).clamp(min=BITNET_SCALE_FLOOR)[row_matrix][:, None]
        quantized = (weight_fp32 / scale).round().clamp(-1, 1) * scale
    return _StraightThrough.apply(weight, quantized)


def fake_quantize_tokens(x: Tensor, width_group: Group | None = None) -> Tensor:
    """x rounded to 8 bits with one scale per token over the full width. `width_group` splits the width, if given."""
    with torch.no_grad():
        absmax = token_absmax(x)
        if width_group is not None:
            reduce_in_place(absmax, width_group, "activation_maxima", op=dist.ReduceOp.MAX)
        codes, scale = quantize_tokens(x, absmax)
        quantized = codes * scale
    return _StraightThrough.apply(x, quantized)


class _BitNetOperands:
    """Mixin that replaces the operands of Megatron's product by their quantised forms."""

    layout: ShardLayout
    """The logical coordinates of this shard. Set when the model is built."""
    splits_width: bool
    config: LlamaTransformerConfig
    tp_group: Group

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        group = self.tp_group
        if self.config.quantization.activation == "int8":
            input = fake_quantize_tokens(input, group if self.splits_width else None)
        operands = input, ternarize(weight, self.layout, group)
        return super()._forward_impl(*operands, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class ColumnParallelBitLinear(_BitNetOperands, ColumnParallelLinear):
    """qkv and gate|up of a BitNet b1.58 model."""

    splits_width = False


class RowParallelBitLinear(_BitNetOperands, RowParallelLinear):
    """o_proj and down_proj of a BitNet b1.58 model."""

    splits_width = True
