"""Operands of low-bit products in 8 bits: symmetric, one scale per token over the full width of the input.

    scale = max|x| / q over the features of a token          codes = round(x / scale)

    int8    q = 127, integers, half to even      the convention of BitNet b1.58, with its floor of 1e-5 on max|x|
    e4m3    q = 448, half to even                8-bit floats with 4 bits of exponent and 3 bits of mantissa (OCP FP8,
                                                 arXiv 2209.05433)

Gradients pass straight through: the backward of a linear uses the quantised activation for dW and ignores the rounding
for dx.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATION_QMAX = 127
ACTIVATION_CODES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "none": None}
"""Type of the codes for each value of `quantization.activation`."""
CODE_MAX = {torch.int8: ACTIVATION_QMAX, torch.float8_e4m3fn: 448}
"""The code of the element of largest magnitude of a token, by type of the codes."""
# The floor of BitNet b1.58's act_quant. With it a token of zeros has a scale. Exported engines use the same floor.
ABSMAX_FLOOR = 1e-5
# Gradients may be smaller than activations by any factor. This floor only keeps q / max|x| finite for a token without a
# gradient.
GRADIENT_ABSMAX_FLOOR = 2.0**-100


def token_absmax(x: Tensor) -> Tensor:
    """Largest magnitude of each token, fp32 [..., 1] for x [..., features]."""
    return x.abs().amax(dim=-1, keepdim=True).float()


def token_scale(absmax: Tensor, dtype: torch.dtype = torch.int8, floor: float = ABSMAX_FLOOR) -> Tensor:
    """The value of one code of `dtype` (int8 or float8_e4m3fn), from the per-token maximum over the FULL width."""
    return absmax.clamp(min=floor) / CODE_MAX[dtype]


def codes_at(x: Tensor, scale: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """Codes of x [..., features] at the scale [..., 1]. Equal x and scale give equal codes."""
    codes, largest = x.float() * (1.0 / scale), CODE_MAX[dtype]
    if dtype == torch.int8:
        codes = codes.round_()
    # A maximum times the reciprocal may end an ulp above the largest code.
    return codes.clamp_(-largest, largest).to(dtype)


def quantize_tokens(x: Tensor, absmax: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Codes of the shape of x in `dtype`, and fp32 scale [..., 1], from the per-token maximum over the FULL width."""
    scale = token_scale(absmax, dtype)
    return codes_at(x, scale, dtype), scale
