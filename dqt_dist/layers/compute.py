"""The three products of a low-bit linear, for each compute precision.

    forward   y  = x_q @ C^T        [tokens, in] @ [out, in]^T       unscaled: scales belong to the epilogue
    dgrad     dx = g @ C            [tokens, out] @ [out, in]        g = dy * row scale
    wgrad     dW = dy^T @ x         [tokens, out]^T @ [tokens, in]   x dequantised; summed into the gradient sink

Codes are unpacked to the operand type of the product and thrown away after it: scratch of one layer, never of the model.
With ternary codes and int8 activations every partial sum of the forward is an integer below 2^24 (in_features < 132,104), so
fp32 holds it exactly, whatever the order of the sum and the TP degree. In bf16 the operands (|x_q| <= 127, any code) are
exact too and only the result is rounded.

A new precision is one more entry of COMPUTE: the linear itself does not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqt_dist.lowbit.matrix import LowBitMatrix


@dataclass(frozen=True)
class DequantizedCompute:
    """Products in one floating-point type, fp32 (the reference) or bf16, with codes as exact operands."""

    dtype: torch.dtype

    def forward(self, x: Tensor, weight: LowBitMatrix) -> Tensor:
        """x [..., in] (int8 codes or floats) -> [..., out], without any scale."""
        return x.to(self.dtype) @ weight.unpack().to(self.dtype).t()

    def dgrad(self, grad_scaled: Tensor, weight: LowBitMatrix) -> Tensor:
        """grad_scaled [..., out], the output gradient times the row scales -> [..., in]."""
        return grad_scaled.to(self.dtype) @ weight.unpack().to(self.dtype)

    def wgrad(self, grad: Tensor, x: Tensor, x_scale: Tensor | None, weight: LowBitMatrix) -> None:
        """Adds grad^T @ (x * x_scale) to the gradient sink of `weight`, in the sink's precision."""
        if x_scale is not None:
            x = x * x_scale
        grad, x = (t.reshape(-1, t.shape[-1]).to(self.dtype) for t in (grad, x))
        sink, has_sum = weight.gradient_sink()
        if self.dtype == sink.dtype:
            torch.addmm(sink, grad.t(), x, beta=float(has_sum), out=sink)
        else:
            product = torch.mm(grad.t(), x, out_dtype=sink.dtype) if grad.is_cuda else grad.t().float() @ x.float()
            sink.add_(product) if has_sum else sink.copy_(product)
        weight.gradient_written()


COMPUTE = {"fp32": DequantizedCompute(torch.float32), "bf16": DequantizedCompute(torch.bfloat16)}
