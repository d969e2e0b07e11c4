"""The low-bit linear, column- and row-parallel, each as one autograd function.

    column-parallel   W split by rows (outputs)      x the same on every TP rank, or split by sequence and gathered
                                                     as codes
    row-parallel      W split by columns (inputs)    x split by features; partial sums are reduced, THEN scaled

    x_q, s_x = quantize(x)                  per token over the full width: row-parallel inputs take a MAX over TP first
    y  = (x_q @ C^T) * s_x * s_row          reduced as unscaled sums: exact integers for ternary codes in fp32
    dx = (dy * s_row) @ C                   straight through the activation's rounding
    dW = dy^T @ (x_q * s_x)                 goes to the weight's gradient buffer, not to autograd

A column-parallel linear may contain the RMSNorm that precedes it, like Megatron's LayerNormColumnParallelLinear. Norm
and quantisation are then one pass, and the normed activation is never written. The forward keeps its input, which the
residual stream or attention keeps anyway, and one scale per token. The backward computes the codes again from these. Of
the weight nothing is kept but its packed codes.

The classes have the constructor and the (output, bias) result of Megatron's parallel linears, so a layer spec can name
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.kernels.quantize import Operand, operand_scale, quantize, rms_norm_backward, rms_norm_quantize
from dqt_dist.layers.compute import Compute, Multiply, make_compute
from dqt_dist.layers.transformer_config import LlamaTransformerConfig
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.parallel.collectives import (
    Group,
    Pending,
    reduce_in_place,
    start_gather_sequence,
    start_reduce,
    start_scatter_sum_of_pieces,
)


class LowBitLinear(nn.Module):
    """What the two directions share: the weight, the products of its compute precision, and the group of ranks."""

    def __init__(self, rows: int, columns: int, config: LlamaTransformerConfig, bias: bool, tp_group: Group) -> None:
        super().__init__()
        if bias:
            raise ValueError("low-bit linears have no bias (LLaMA has none)")
        self.group = tp_group
        self.sequence_parallel = config.sequence_parallel
        self.compute: Compute = make_compute(config.quantization)
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = LowBitMatrix.of(config.quantization, rows, columns, torch.device(device))


# ---- parts of the forward and the backward of either direction, on [tokens, features] ----


def column_forward(x: Operand, linear: LowBitLinear, dtype: torch.dtype) -> Tensor:
    """y [tokens, out / tp] of a normed and quantised x, [tokens / tp, in] under sequence parallelism."""
    compute, weight = linear.compute, linear.weight
    y, x = multiply_all_tokens(
        x, start_full_sequence(x, linear), compute.product(weight), compute.product_dtype, weight.rows, linear
    )
    return compute.epilogue(y, x.scale, weight, dtype)


@dataclass
class PendingOperand:
    """An operand on its way: its values, and its scale if there is one."""

    tensors: Pending[list[Tensor]]

    def wait(self) -> Operand:
        """The operand, once it has arrived."""
        return Operand(*self.tensors.wait())


def start_full_sequence(x: Operand, linear: LowBitLinear) -> PendingOperand:
    """The operand of all tokens: under sequence parallelism each TP rank brings its own."""
    tensors = [x.values] if x.scale is None else [x.values, x.scale]
    return PendingOperand(
        start_gather_sequence(tensors, linear.group) if linear.sequence_parallel else Pending(tensors)
    )


def multiply_all_tokens(
    own: Operand,
    pending: PendingOperand,
    multiply: Multiply,
    dtype: torch.dtype,
    features: int,
    linear: LowBitLinear,
) -> tuple[Tensor, Operand]:
    """`multiply` of the operand of all tokens, [tokens, features] of type `dtype`, and this operand.

    Under sequence parallelism a rank multiplies its own tokens while the tokens of the others travel.
    """
    if not linear.sequence_parallel:
        return multiply(own), own
    count, rank = own.values.shape[0], linear.group.rank()
    start, stop, end = rank * count, (rank + 1) * count, linear.group.size() * count
    y = torch.empty(end, features, dtype=dtype, device=own.values.device)
    multiply(own, y[start:stop])
    full = pending.wait()
    for first, last in ((0, start), (stop, end)):
        if first < last:
            multiply(full.tokens(first, last), y[first:last])
    return y, full


def start_multiply_and_scatter(
    multiply: Multiply, x: Operand, dtype: torch.dtype, features: int, linear: LowBitLinear
) -> Pending[Tensor]:
    """`multiply` of x, [tokens, features] of type `dtype`, summed over TP: this rank's tokens of the sum.

    The partial sums of a rank's tokens travel to this rank during the product of the next rank's.
    """
    count = x.values.shape[0] // linear.group.size()

    def piece(rank: int, out: Tensor | None) -> Tensor:
        return multiply(x.tokens(rank * count, (rank + 1) * count), out)

    return start_scatter_sum_of_pieces(piece, (count, features), dtype, x.values.device, linear.group)


def start_column_dgrad(grad: Operand, linear: LowBitLinear) -> Pending[Tensor]:
    """dx summed over TP, in the type of dgrad. Under sequence parallelism dx has this rank's tokens only."""
    compute, weight = linear.compute, linear.weight
    multiply = compute.dgrad(weight)
    if linear.sequence_parallel:
        return start_multiply_and_scatter(multiply, grad, compute.dtype, weight.columns, linear)
    return start_reduce(multiply(grad), linear.group, "activations")


def complete_scale(scale: Tensor, linear: LowBitLinear) -> Tensor:
    """Scale [tokens, 1] of a row-parallel input, from the scale of this rank's features."""
    reduce_in_place(scale, linear.group, "activation_maxima", op=dist.ReduceOp.MAX)
    return scale


def row_forward(x: Operand, linear: LowBitLinear, dtype: torch.dtype) -> Tensor:
    """y [tokens, out] of a quantised x [tokens, in / tp]; under sequence parallelism this rank's tokens of y."""
    compute, weight = linear.compute, linear.weight
    multiply = compute.product(weight)
    if linear.sequence_parallel:
        y = start_multiply_and_scatter(multiply, x, compute.product_dtype, weight.rows, linear).wait()
        count, rank = y.shape[0], linear.group.rank()
        x = x.tokens(rank * count, (rank + 1) * count)
    else:
        y = multiply(x)
        reduce_in_place(y, linear.group, "activations")
    return compute.epilogue(y, x.scale, weight, dtype)


class RowGradient:
    """The gradient of y of a row-parallel linear, on its way to all tokens.

    Under sequence parallelism the operand is what travels, so each rank quantises its own tokens only.
    """

    def __init__(self, grad: Tensor, linear: LowBitLinear) -> None:
        self.linear = linear
        self.own = linear.compute.gradient(grad, linear.weight)
        self.pending = start_full_sequence(self.own, linear)

    def dgrad(self) -> tuple[Tensor, Operand]:
        """dx of all tokens, and the gradient of all tokens."""
        compute, weight = self.linear.compute, self.linear.weight
        return multiply_all_tokens(
            self.own, self.pending, compute.dgrad(weight), compute.dtype, weight.columns, self.linear
        )


def flat(x: Tensor) -> Tensor:
    """[..., features] as contiguous [tokens, features]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def unflat(y: Tensor, x: Tensor) -> Tensor:
    """[tokens, features] with the inner dimensions of x.

    Autograd does not see a view, so the next operation may work in place.
    """
    return torch.ops.aten._unsafe_view(y, (-1, *x.shape[1:-1], y.shape[-1]))


class _ColumnParallel(torch.autograd.Function):
    """x [s / (tp if sequence_parallel else 1), b, in] -> y [s, b, out / tp]; norm_weight [in] or None."""

    @staticmethod
    def forward(ctx, x: Tensor, norm_weight: Tensor | None, linear: ColumnParallelLowBitLinear) -> Tensor:
        operand, _ = linear.operand(flat(x), norm_weight)
        ctx.save_for_backward(x, norm_weight, operand.scale)
        ctx.linear = linear
        y = column_forward(operand, linear, x.dtype)
        return unflat(y, x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, norm_weight, scale = ctx.saved_tensors
        linear: ColumnParallelLowBitLinear = ctx.linear
        tokens = flat(x)
        operand, inverse_rms = linear.operand(tokens, norm_weight, scale)
        # x travels during the first product, the sum of dx over TP during the second.
        full_x = start_full_sequence(operand, linear)
        gradient = linear.compute.gradient(flat(grad), linear.weight)
        pending_dx = start_column_dgrad(gradient, linear)
        linear.compute.wgrad(gradient, full_x.wait(), linear.weight)
        dx = pending_dx.wait().to(x.dtype)
        if norm_weight is None or inverse_rms is None:
            return unflat(dx, x), None, None
        dx, norm_gradient = norm_backward(dx, tokens, norm_weight, inverse_rms, linear)
        return unflat(dx, x), norm_gradient, None


def norm_backward(
    dh: Tensor, x: Tensor, norm_weight: Tensor, inverse_rms: Tensor, linear: LowBitLinear
) -> tuple[Tensor, Tensor]:
    """dx and the norm weight's gradient. Under sequence parallelism TP ranks have different tokens and add up."""
    dx, norm_gradient = rms_norm_backward(dh, x, norm_weight, inverse_rms)
    if linear.sequence_parallel:
        reduce_in_place(norm_gradient, linear.group, "gradients")
    return dx, norm_gradient.to(norm_weight.dtype)


class _RowParallel(torch.autograd.Function):
    """x [s, b, in / tp] -> y [s / (tp if sequence_parallel else 1), b, out]."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: LowBitLinear) -> Tensor:
        tokens, operand_dtype = flat(x), linear.compute.activation_dtype
        scale = None
        if operand_dtype is not None and linear.group.size() > 1:
            scale = complete_scale(operand_scale(tokens, operand_dtype), linear)
        operand = quantize(tokens, operand_dtype, scale)
        ctx.save_for_backward(x, operand.scale)
        ctx.linear = linear
        y = row_forward(operand, linear, x.dtype)
        return unflat(y, x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        x, scale = ctx.saved_tensors
        linear: LowBitLinear = ctx.linear
        row_gradient = RowGradient(flat(grad), linear)
        operand = quantize(flat(x), linear.compute.activation_dtype, scale)
        dx, gradient = row_gradient.dgrad()
        linear.compute.wgrad(gradient, operand, linear.weight)
        return unflat(dx.to(x.dtype), x), None


def apply_function(function: type[torch.autograd.Function], x: Tensor, *arguments: Any) -> Tensor:
    """`function` on x; refuses an x without a gradient while gradients are enabled."""
    if torch.is_grad_enabled() and not x.requires_grad:
        # Autograd would skip this backward, and the weight's gradient would be lost without a message.
        raise RuntimeError("the input of a low-bit linear must require a gradient while gradients are enabled")
    return function.apply(x, *arguments)


class ColumnParallelLowBitLinear(LowBitLinear):
    """Stands in for megatron.core's ColumnParallelLinear."""

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
        self.eps = config.layernorm_epsilon
        self.register_parameter("norm_weight", None)

    def operand(
        self, x: Tensor, norm_weight: Tensor | None, scale: Tensor | None = None
    ) -> tuple[Operand, Tensor | None]:
        """x [tokens, in] normed (with a norm) and quantised, and the inverse root mean square of x (with a norm)."""
        if norm_weight is None:
            return quantize(x, self.compute.activation_dtype, scale), None
        return rms_norm_quantize(x, norm_weight, self.eps, self.compute.activation_dtype, scale)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return apply_function(_ColumnParallel, x, self.norm_weight, self), None


class NormColumnParallelLowBitLinear(ColumnParallelLowBitLinear):
    """A column-parallel linear with the RMSNorm before it inside (qkv, gate|up)."""

    def __init__(self, input_size: int, output_size: int, *, config: LlamaTransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.norm_weight = nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))


class RowParallelLowBitLinear(LowBitLinear):
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
        return apply_function(_RowParallel, x, self), None
