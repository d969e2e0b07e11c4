"""Operands of low-bit products: one pass computes h, the input of a product, and its 8-bit quantisation.

    identity   h = x                                   attention's output, and gradients as h = x * feature_scale
    norm       h = x / sqrt(mean(x^2) + eps) * weight  RMSNorm before qkv and gate|up
    swiglu     h = silu(gate) * up                     before down_proj; x is gate|up side by side

h exists in registers only. It is computed in fp32 from x of any type and rounded once, to the codes. The backward
passes of norm and swiglu are here too. They read the forward's inputs and compute h anew.

All tensors are [tokens, features], contiguous. Triton on CUDA; elsewhere the definitions in this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dqt_dist.lowbit.activation import ABSMAX_FLOOR, GRADIENT_ABSMAX_FLOOR, codes_at, token_absmax, token_scale


@dataclass(frozen=True)
class Operand:
    """One side of a product.

    values: [tokens, features], int8 or e4m3 codes, or bf16 or fp32 numbers. scale: what one code stands for, fp32
    [tokens, 1]; None where values are numbers.
    """

    values: Tensor
    scale: Tensor | None = None

    def tokens(self, start: int, stop: int) -> Operand:
        """Some of the tokens."""
        return Operand(self.values[start:stop], None if self.scale is None else self.scale[start:stop])

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """values * scale in `dtype`."""
        return self.values.to(dtype) if self.scale is None else scaled(self.values, self.scale, None, dtype)


def quantize(
    x: Tensor, operand_dtype: torch.dtype | None, scale: Tensor | None = None, feature_scale: Tensor | None = None
) -> Operand:
    """x as codes of type `operand_dtype` (int8 or e4m3), or as it is for None.

    scale: fp32 [tokens, 1] when it is known already. feature_scale: fp32 [features]; x is then a gradient.
    """
    if operand_dtype is None:
        return Operand(x)
    if x.is_cuda:
        from dqt_dist.kernels import quantize_triton

        return Operand(*quantize_triton.quantize(x, operand_dtype, scale, feature_scale))
    if feature_scale is not None:
        return _quantized(x.float() * feature_scale, operand_dtype, x.dtype, scale, GRADIENT_ABSMAX_FLOOR)
    return _quantized(x, operand_dtype, x.dtype, scale)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, operand_dtype: torch.dtype | None, scale: Tensor | None = None
) -> tuple[Operand, Tensor]:
    """The operand of norm(x), and r = 1 / sqrt(mean(x^2) + eps), fp32 [tokens, 1].

    With an `operand_dtype` of None the operand is norm(x) in x's type.
    """
    if x.is_cuda:
        from dqt_dist.kernels import quantize_triton

        codes, scale, inverse_rms = quantize_triton.rms_norm_quantize(x, weight, eps, operand_dtype, scale)
        return Operand(codes, scale), inverse_rms
    wide = x.float()
    inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return _quantized(wide * inverse_rms * weight.float(), operand_dtype, x.dtype, scale), inverse_rms


def rms_norm_backward(dh: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    """dx in x's type and dweight fp32 [features], from the gradient of h.

    n = x * r       dweight = sum over tokens of dh * n       dx = r * (dh * w - n * mean(dh * w * n))
    """
    if x.is_cuda:
        from dqt_dist.kernels import quantize_triton

        return quantize_triton.rms_norm_backward(dh, x, weight, inverse_rms)
    dh, normed = dh.float(), x.float() * inverse_rms
    dn = dh * weight.float()
    dx = (dn - normed * (dn * normed).mean(dim=-1, keepdim=True)) * inverse_rms
    return dx.to(x.dtype), (dh * normed).sum(dim=0)


def operand_scale(x: Tensor, operand_dtype: torch.dtype) -> Tensor:
    """The scale of x as an operand, fp32 [tokens, 1], from these features alone. The scale over features that are split
    over ranks is the largest of theirs, as a division by the largest code keeps the order."""
    if x.is_cuda:
        from dqt_dist.kernels import quantize_triton

        return quantize_triton.operand_scale(x, operand_dtype)
    return token_scale(token_absmax(x), operand_dtype)


def swiglu_scale(gate_up: Tensor, operand_dtype: torch.dtype) -> Tensor:
    """`operand_scale` of silu(gate) * up."""
    if gate_up.is_cuda:
        from dqt_dist.kernels import quantize_triton

        return quantize_triton.swiglu_scale(gate_up, operand_dtype)
    return token_scale(token_absmax(_swiglu(gate_up)), operand_dtype)


def swiglu_quantize(gate_up: Tensor, operand_dtype: torch.dtype | None, scale: Tensor | None = None) -> Operand:
    """The operand of silu(gate) * up [tokens, features] for gate_up [tokens, 2 * features]."""
    if gate_up.is_cuda:
        from dqt_dist.kernels import quantize_triton

        return Operand(*quantize_triton.swiglu_quantize(gate_up, operand_dtype, scale))
    return _quantized(_swiglu(gate_up), operand_dtype, gate_up.dtype, scale)


def swiglu_backward(
    dh: Tensor,
    gate_up: Tensor,
    h_scale: Tensor | None,
    operand_dtype: torch.dtype | None,
    gradient_scale: Tensor | None,
) -> tuple[Operand, Operand]:
    """The gradient of gate|up, and the operand h anew, in one pass over dh and gate_up.

        dh               [tokens, features]
        gate_up          [tokens, 2 * features]
        h_scale          fp32 [tokens, 1]        scale of the forward's operand, whose type is `operand_dtype`
        gradient_scale   fp32 [2 * features]     one value for gate and one for up

    With a gradient_scale, the first result is gradient * gradient_scale as e4m3 codes with a scale per token. Without a
    gradient_scale, it is the gradient in gate_up's type.
    """
    if gate_up.is_cuda:
        from dqt_dist.kernels import quantize_triton

        gradient, h = quantize_triton.swiglu_backward(dh, gate_up, h_scale, operand_dtype, gradient_scale)
        return Operand(*gradient), Operand(h, h_scale)
    gate, up = _halves(gate_up)
    dh, gate_sigmoid = dh.float(), torch.sigmoid(gate)
    silu = gate * gate_sigmoid
    gradient = torch.cat([dh * up * (gate_sigmoid + silu * (1 - gate_sigmoid)), dh * silu], dim=-1)
    h = _quantized(silu * up, operand_dtype, gate_up.dtype, h_scale)
    if gradient_scale is None:
        return Operand(gradient.to(gate_up.dtype)), h
    return quantize(gradient, torch.float8_e4m3fn, feature_scale=gradient_scale), h


def scaled(x: Tensor, token_scale: Tensor | None, feature_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x * token_scale [tokens, 1] * feature_scale [features], computed in fp32 and rounded once, to `dtype`."""
    if x.is_cuda:
        from dqt_dist.kernels import quantize_triton

        return quantize_triton.scaled(x, token_scale, feature_scale, dtype)
    x = x.float()
    if token_scale is not None:
        x = x * token_scale
    if feature_scale is not None:
        x = x * feature_scale
    return x.to(dtype)


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """gate and up in fp32, each contiguous.

    Over the short rows of a strided half, torch takes its scalar exponential, whose last bit differs from that of the
    vectorised one. Results would then depend on the tensor-parallel degree.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return gate.contiguous(), up.contiguous()


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = _halves(gate_up)
    return functional.silu(gate) * up


def _quantized(
    h: Tensor, operand_dtype: torch.dtype | None, dtype: torch.dtype, scale: Tensor | None, floor: float = ABSMAX_FLOOR
) -> Operand:
    """h as codes at `scale`, by default the scale of h itself; h in `dtype` when `operand_dtype` is None."""
    if operand_dtype is None:
        return Operand(h.to(dtype))
    if scale is None:
        scale = token_scale(token_absmax(h), operand_dtype, floor)
    return Operand(codes_at(h, scale, operand_dtype), scale)
