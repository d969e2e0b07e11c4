"""The low-bit linear, column- and row-parallel, each as one autograd function.

    column-parallel   W split by rows (outputs)      x the same on every TP rank, or split by sequence and gathered as int8
    row-parallel      W split by columns (inputs)    x split by features; partial sums are reduced, THEN scaled

    x_q, s_x = quantize(x)                  per token over the full width: row-parallel inputs take a MAX over TP first
    y  = (x_q @ C^T) * s_x * s_row          reduced as unscaled sums: exact integers for ternary codes in fp32
    dx = (dy * s_row) @ C                   straight through the activation's rounding
    dW = dy^T @ (x_q * s_x)                 goes to the weight's gradient sink, not to autograd

Kept for the backward: the int8 activation and its scales (half of bf16), and nothing of the weight but its packed codes.
The classes have the constructor and the (output, bias) result of Megatron's parallel linears, so a layer spec can name them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.layers.collectives import Group, gather_sequence, local_sequence, reduce_in_place, scatter_sum_sequence
from dqt_dist.layers.compute import COMPUTE, DequantizedCompute
from dqt_dist.layers.transformer_config import LlamaTransformerConfig
from dqt_dist.lowbit.activation import quantize_tokens, token_absmax
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.matrix import LowBitMatrix


def _quantize(x: Tensor, quantize: bool, width_group: Group | None = None) -> tuple[Tensor, Tensor | None]:
    """x as int8 codes and per-token scales, or as it is when activations stay in floating point."""
    if not quantize:
        return x, None
    absmax = token_absmax(x)
    if width_group is not None:
        reduce_in_place(absmax, width_group, "activation_maxima", op=dist.ReduceOp.MAX)
    return quantize_tokens(x, absmax)


def _apply_scales(y: Tensor, x_scale: Tensor | None, weight: LowBitMatrix, dtype: torch.dtype) -> Tensor:
    y = y.float()
    if x_scale is not None:
        y = y * x_scale
    return (y * weight.row_scale()).to(dtype)


class _ColumnParallel(torch.autograd.Function):
    """x [s / (tp if sequence_parallel else 1), b, in] -> y [s, b, out / tp]."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: LowBitMatrix, compute: DequantizedCompute, quantize: bool, group: Group, sequence: bool
    ) -> Tensor:
        x_q, x_scale = _quantize(x, quantize)
        ctx.save_for_backward(x_q, x_scale)
        ctx.weight, ctx.compute, ctx.group, ctx.sequence, ctx.dtype = weight, compute, group, sequence, x.dtype
        x_q, x_scale = _ColumnParallel.full_sequence(ctx, x_q, x_scale)
        return _apply_scales(compute.forward(x_q, weight), x_scale, weight, x.dtype)

    @staticmethod
    def full_sequence(ctx, x_q: Tensor, x_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not ctx.sequence:
            return x_q, x_scale
        return gather_sequence(x_q, ctx.group), None if x_scale is None else gather_sequence(x_scale, ctx.group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x_q, x_scale = _ColumnParallel.full_sequence(ctx, *ctx.saved_tensors)
        weight, compute, group = ctx.weight, ctx.compute, ctx.group
        dx = compute.dgrad(grad * weight.row_scale(), weight).to(ctx.dtype)
        # Sum over TP while the weight gradient is computed; under sequence parallelism each rank keeps its tokens.
        handle = None
        if ctx.sequence:
            dx = scatter_sum_sequence(dx, group)
        else:
            handle = reduce_in_place(dx, group, "activations", async_op=True)
        compute.wgrad(grad, x_q, x_scale, weight)
        if handle is not None:
            handle.wait()
        return dx, None, None, None, None, None


class _RowParallel(torch.autograd.Function):
    """x [s, b, in / tp] -> y [s / (tp if sequence_parallel else 1), b, out]."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: LowBitMatrix, compute: DequantizedCompute, quantize: bool, group: Group, sequence: bool
    ) -> Tensor:
        x_q, x_scale = _quantize(x, quantize, width_group=group)
        ctx.save_for_backward(x_q, x_scale)
        ctx.weight, ctx.compute, ctx.group, ctx.sequence, ctx.dtype = weight, compute, group, sequence, x.dtype
        y = compute.forward(x_q, weight)
        if sequence:
            y = scatter_sum_sequence(y, group)
            x_scale = None if x_scale is None else local_sequence(x_scale, group)
        else:
            reduce_in_place(y, group, "activations")
        return _apply_scales(y, x_scale, weight, x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x_q, x_scale = ctx.saved_tensors
        weight, compute = ctx.weight, ctx.compute
        if ctx.sequence:
            grad = gather_sequence(grad, ctx.group)
        dx = compute.dgrad(grad * weight.row_scale(), weight).to(ctx.dtype)
        compute.wgrad(grad, x_q, x_scale, weight)
        return dx, None, None, None, None, None


class _LowBitLinear(nn.Module):
    """What the two directions share: the weight and how a product is computed."""

    def __init__(self, rows: int, columns: int, config: LlamaTransformerConfig, bias: bool, tp_group: Group) -> None:
        super().__init__()
        if bias:
            raise ValueError("low-bit linears have no bias (LLaMA has none)")
        quantization = config.quantization
        self.group = tp_group
        self.sequence_parallel = config.sequence_parallel
        self.compute = COMPUTE[quantization.compute]
        self.quantize_activation = quantization.activation == "int8"
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = LowBitMatrix(rows, columns, make_grid(quantization.bits), torch.device(device))

    def _apply_function(self, function: type[torch.autograd.Function], x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not x.requires_grad:
            # Autograd would skip this backward and the weight's gradient would be lost without a word.
            raise RuntimeError("the input of a low-bit linear must require a gradient while gradients are enabled")
        return function.apply(
            x, self.weight, self.compute, self.quantize_activation, self.group, self.sequence_parallel
        )


class ColumnParallelLowBitLinear(_LowBitLinear):
    """Stands in for megatron.core's ColumnParallelLinear (qkv, gate|up)."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: LlamaTransformerConfig,
        tp_group: Group,
        bias: bool = False,
        gather_output: bool = False,
        **_: Any,
    ) -> None:
        if gather_output:
            raise ValueError("gather_output is not supported by low-bit linears")
        super().__init__(output_size // tp_group.size(), input_size, config, bias, tp_group)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self._apply_function(_ColumnParallel, x), None


class RowParallelLowBitLinear(_LowBitLinear):
    """Stands in for megatron.core's RowParallelLinear (o_proj, down_proj)."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: LlamaTransformerConfig,
        tp_group: Group,
        bias: bool = False,
        input_is_parallel: bool = True,
        **_: Any,
    ) -> None:
        if not input_is_parallel:
            raise ValueError("row-parallel low-bit linears take an input that is already split")
        super().__init__(output_size, input_size // tp_group.size(), config, bias, tp_group)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self._apply_function(_RowParallel, x), None
