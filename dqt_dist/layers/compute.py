"""The three products of a low-bit linear, for each compute precision.

    product    y  = x_q @ C^T               [tokens, in] @ [out, in]^T       partial sums that ranks may add up
    epilogue   y * x scale * row scale      after ranks have added up
    gradient   dy as an operand of dgrad and wgrad
    dgrad      dx = (dy * row scale) @ C    [tokens, out] @ [out, in]
    wgrad      dW = dy^T @ x                [tokens, out]^T @ [tokens, in]   x dequantised; added to weight.gradient

`product` and `dgrad` unpack the codes of a weight to the operand type and return a function that multiplies with them,
all tokens at once or some at a time. The unpacked codes are dropped with the function. So unpacked codes of one layer
exist at a time, never those of the whole model.

    compute   product                                          dgrad and wgrad
    fp32      fp32; the reference                              fp32
    bf16      bf16 operands, both exact (|x_q| <= 127)         bf16; exact weights when scales are powers of two
    int8      int8 x int8 -> int32, exact                      as bf16
    fp8       e4m3 x e4m3, codes exact; scales inside          dy in e4m3 per token; dW of e4m3 or bf16 operands

With ternary codes and int8 activations, every partial sum of the forward is an integer below 2^24
(in_features < 132,104). fp32 holds such sums exactly, whatever the order of the sum and the TP degree. int8
sums are exact for every grid.

All tensors are [tokens, features].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dqt_dist.config import QuantizationConfig
from dqt_dist.dtypes import TORCH_DTYPES
from dqt_dist.kernels.quantize import Operand, quantize, scaled
from dqt_dist.kernels.scaled_matmul import scaled_matmul
from dqt_dist.kernels.transpose import transpose
from dqt_dist.kernels.unpack import unpack_operand
from dqt_dist.lowbit.activation import ACTIVATION_CODES
from dqt_dist.lowbit.matrix import LowBitMatrix

E4M3 = torch.float8_e4m3fn


def _operand(
    weight: LowBitMatrix, dtype: torch.dtype, row_scale: Tensor | None = None, transposed: bool = False
) -> Tensor:
    return unpack_operand(weight.whole(), weight.grid, weight.columns, dtype, row_scale, transposed)


class Multiply(Protocol):
    """A product with a weight: [tokens, features] to [tokens, features], into `out` if there is one."""

    def __call__(self, x: Operand, out: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class FloatCompute:
    """Products in one floating-point type, fp32 (the reference) or bf16."""

    dtype: torch.dtype
    activation_dtype: torch.dtype | None
    """Type of a quantised input; None when inputs stay in floating point."""
    gradient_operand_dtype: torch.dtype | None = None

    @property
    def product_dtype(self) -> torch.dtype:
        """Type of the partial sums that `product` gives."""
        return self.dtype

    def product(self, weight: LowBitMatrix) -> Multiply:
        codes = _operand(weight, self.dtype).t()
        return lambda x, out=None: torch.mm(x.values.to(self.dtype), codes, out=out)

    def epilogue(self, y: Tensor, x_scale: Tensor | None, weight: LowBitMatrix, dtype: torch.dtype) -> Tensor:
        return scaled(y, x_scale, weight.row_scale(), dtype)

    def gradient(self, grad: Tensor, weight: LowBitMatrix) -> Operand:
        return Operand(grad.to(self.dtype))

    def dgrad(self, weight: LowBitMatrix) -> Multiply:
        values = _operand(weight, self.dtype, weight.row_scale())
        return lambda x, out=None: torch.mm(x.values, values, out=out)

    def wgrad(self, grad: Operand, x: Operand, weight: LowBitMatrix) -> None:
        add_weight_gradient(grad.values, x.dequantized(self.dtype), weight)


class Int8Compute(FloatCompute):
    """The forward on integer tensor cores, the backward as in bf16."""

    @property
    def product_dtype(self) -> torch.dtype:
        return torch.int32

    def product(self, weight: LowBitMatrix) -> Multiply:
        codes = _operand(weight, torch.int8).t()

        def multiply(x: Operand, out: Tensor | None = None) -> Tensor:
            if out is None:
                return torch._int_mm(x.values, codes)  # pyright: ignore[reportPrivateImportUsage]
            return torch._int_mm(x.values, codes, out=out)  # pyright: ignore[reportPrivateImportUsage]

        return multiply


@dataclass(frozen=True)
class Fp8Compute:
    """e4m3 operands throughout, bf16 results; scales are applied inside the products."""

    dtype: torch.dtype
    activation_dtype: torch.dtype | None
    gradient_operand_dtype: torch.dtype | None
    """e4m3; None when weight gradients are products of bf16 operands. Then the bf16 gradient is needed too."""

    @property
    def product_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def product(self, weight: LowBitMatrix) -> Multiply:
        codes, row_scale = _operand(weight, E4M3), weight.row_scale()

        def multiply(x: Operand, out: Tensor | None = None) -> Tensor:
            assert x.scale is not None
            return scaled_matmul(x.values, codes, x.scale, row_scale, out=out)

        return multiply

    def epilogue(self, y: Tensor, x_scale: Tensor | None, weight: LowBitMatrix, dtype: torch.dtype) -> Tensor:
        return y.to(dtype)

    def gradient(self, grad: Tensor, weight: LowBitMatrix) -> Operand:
        if self.gradient_operand_dtype is None:
            return Operand(grad.to(self.dtype))
        return quantize(grad, E4M3, feature_scale=weight.row_scale())

    def dgrad(self, weight: LowBitMatrix) -> Multiply:
        codes = _operand(weight, E4M3, transposed=True)

        def multiply(x: Operand, out: Tensor | None = None) -> Tensor:
            if x.scale is None:
                x = quantize(x.values, E4M3, feature_scale=weight.row_scale())
            assert x.scale is not None
            return scaled_matmul(x.values, codes, x.scale, out=out)

        return multiply

    def wgrad(self, grad: Operand, x: Operand, weight: LowBitMatrix) -> None:
        """dW = sum over tokens of (grad * grad scale / row scale)^T * (x * x scale), with the scales of each token.

        A product of tensor cores cannot scale each term of its sum. So t = grad scale * x scale, relative to the
        largest t, is multiplied into the gradient's codes, and the largest t is applied to the sum. The row scale is in
        the gradient already and is divided out.
        """
        if grad.scale is None or x.scale is None:
            add_weight_gradient(grad.values, x.dequantized(self.dtype), weight)
            return
        token_scale = grad.scale * x.scale
        largest = token_scale.amax()
        columns_of_grad = transpose(grad.values, token_scale / largest)
        product = scaled_matmul(columns_of_grad, transpose(x.values), largest / weight.row_scale())
        weight.gradient.add(product)


def add_weight_gradient(grad: Tensor, x: Tensor, weight: LowBitMatrix) -> None:
    """Adds grad^T @ x to the gradient of `weight`, in the precision of the gradient's buffer.

    Both operands are [tokens, features] of one type.
    """
    buffer = weight.gradient
    if buffer.dtype == grad.dtype:
        total, has_sum = buffer.accumulator(grad.device)
        torch.addmm(total, grad.t(), x, beta=float(has_sum), out=total)
        buffer.micro_batch_added()
    elif grad.is_cuda:
        buffer.add(torch.mm(grad.t(), x, out_dtype=buffer.dtype))
    else:
        buffer.add(grad.t().float() @ x.float())


Compute = FloatCompute | Fp8Compute


def make_compute(quantization: QuantizationConfig) -> Compute:
    """The products of `quantization.compute`."""
    activation_dtype = ACTIVATION_CODES[quantization.activation]
    if quantization.compute == "fp8":
        return Fp8Compute(torch.bfloat16, activation_dtype, E4M3 if quantization.weight_gradient == "fp8" else None)
    if quantization.compute == "int8":
        return Int8Compute(torch.bfloat16, activation_dtype)
    return FloatCompute(TORCH_DTYPES[quantization.compute], activation_dtype)
