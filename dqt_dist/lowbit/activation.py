"""Activations in 8 bits: one scale a token, symmetric, over the full width of the input.

    scale = max|x| / 127 over the features of a token          codes = round(x / scale), half to even, in [-127, 127]

The convention of BitNet b1.58 (127 / absmax with a floor of 1e-5 on the maximum). Gradients pass straight through: the
backward of a linear uses the quantised activation for dW and ignores the rounding for dX.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATION_QMAX = 127
# The floor of BitNet b1.58's act_quant, so that a token of zeros has a scale; exported engines use the same one.
ABSMAX_FLOOR = 1e-5


def token_absmax(x: Tensor) -> Tensor:
    """Largest magnitude of each token, fp32 [..., 1] for x [..., features]."""
    return x.abs().amax(dim=-1, keepdim=True).float()


def quantize_tokens(x: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of x's shape and fp32 scale [..., 1], from the per-token maximum over the FULL width."""
    scale = absmax.clamp(min=ABSMAX_FLOOR) / ACTIVATION_QMAX
    return (x.float() / scale).round_().clamp_(-ACTIVATION_QMAX, ACTIVATION_QMAX).to(torch.int8), scale
