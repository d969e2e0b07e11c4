"""The feed-forward half of a low-bit block as one autograd function: norm, gate|up, SwiGLU, down.

    x -> norm -> quantise -> [gate|up] -> silu(gate) * up -> quantise -> [down] -> y

The results of norm and SwiGLU exist in registers only: one pass reads the output of a product and writes the codes for
the next product. The forward keeps x, which the residual stream keeps anyway, the output of gate|up, and one scale per
token. The backward computes everything else again. It writes SwiGLU's gradient directly as the codes that gate|up's
products read, so the widest tensor of the model is never written as bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from dqt_dist.kernels.quantize import swiglu_backward, swiglu_quantize, swiglu_scale
from dqt_dist.layers.low_bit_linear import (
    ColumnParallelLowBitLinear,
    RowGradient,
    RowParallelLowBitLinear,
    apply_function,
    column_forward,
    complete_scale,
    flat,
    norm_backward,
    row_forward,
    start_column_dgrad,
    start_full_sequence,
    unflat,
)
from dqt_dist.layers.transformer_config import LlamaTransformerConfig


class _FeedForward(torch.autograd.Function):
    """x [s / (tp if sequence_parallel else 1), b, hidden] -> y of the same shape."""

    @staticmethod
    def forward(
        ctx, x: Tensor, norm_weight: Tensor, fc1: ColumnParallelLowBitLinear, fc2: RowParallelLowBitLinear
    ) -> Tensor:
        operand, _ = fc1.operand(flat(x), norm_weight)
        gate_up = column_forward(operand, fc1, x.dtype)
        h_dtype, h_scale = fc2.compute.activation_dtype, None
        if h_dtype is not None and fc2.group.size() > 1:
            h_scale = complete_scale(swiglu_scale(gate_up, h_dtype), fc2)
        h = swiglu_quantize(gate_up, h_dtype, h_scale)
        ctx.save_for_backward(x, norm_weight, operand.scale, gate_up, h.scale)
        ctx.fc1, ctx.fc2 = fc1, fc2
        return unflat(row_forward(h, fc2, x.dtype), x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, norm_weight, x_scale, gate_up, h_scale = ctx.saved_tensors
        fc1: ColumnParallelLowBitLinear = ctx.fc1
        fc2: RowParallelLowBitLinear = ctx.fc2
        tokens = flat(x)

        row_gradient = RowGradient(flat(grad), fc2)
        operand, inverse_rms = fc1.operand(tokens, norm_weight, x_scale)
        assert inverse_rms is not None
        # x travels during the products of the second linear.
        full_x = start_full_sequence(operand, fc1)
        dh, gradient = row_gradient.dgrad()
        quantizes_gradient = fc1.compute.gradient_operand_dtype is not None
        gradient_1, h = swiglu_backward(
            dh, gate_up, h_scale, fc2.compute.activation_dtype, fc1.weight.row_scale() if quantizes_gradient else None
        )
        del dh, gate_up
        fc2.compute.wgrad(gradient, h, fc2.weight)
        del gradient, h, row_gradient

        pending_dx = start_column_dgrad(gradient_1, fc1)
        # The sum over TP is under way during this product.
        fc1.compute.wgrad(gradient_1, full_x.wait(), fc1.weight)
        dx, norm_gradient = norm_backward(pending_dx.wait().to(x.dtype), tokens, norm_weight, inverse_rms, fc1)
        return unflat(dx, x), norm_gradient, None, None


class LowBitFeedForward(nn.Module):
    """Stands in for a norm and megatron.core's MLP."""

    def __init__(self, config: LlamaTransformerConfig) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        assert ffn is not None
        group = parallel_state.get_tensor_model_parallel_group()
        self.linear_fc1 = ColumnParallelLowBitLinear(hidden, 2 * ffn, config=config, tp_group=group)
        self.linear_fc2 = RowParallelLowBitLinear(ffn, hidden, config=config, tp_group=group)
        # The weight belongs to this module and not to linear_fc1, because ZeRO stage 3 gathers the parameters of
        # modules that are called.
        self.norm_weight = nn.Parameter(torch.ones(hidden, dtype=config.params_dtype))

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        return apply_function(_FeedForward, x, self.norm_weight, self.linear_fc1, self.linear_fc2), None
