"""Blocks of 8-bit floats: AdamW's moments in 2.0625 bytes per weight instead of 8.

    x            fp32  [rows, columns]
    codes        uint8 [rows, columns]
    exponents    uint8 [rows, columns / 32]    e: the exponent field of max|x| over a block of 32 neighbouring columns

A block never crosses a row, and begins at a multiple of 32. The columns of every tensor-parallel rank begin at a
multiple of 32 too, so the blocks are the same in every layout.

    signed     s eeee mmm    e4m3 (OCP FP8, arXiv 2209.05433), which GPUs convert    the first moment
               code = e4m3(x * 2^(134 - e))
               the largest value of a block is in [128, 256); the smallest step, 2^-9, is 2^-16 below that
    unsigned   eeeee mmm     the sign bit becomes a fifth exponent bit               the second moment
               code = (bits of x - (e - 30) * 2^23) / 2^20
               the range reaches down to 2^-30 of the largest value, so to 2^-15 of the largest root

In the signed format e counts as 8 or more, so that 2^(134 - e) and its inverse are normal numbers. In the unsigned
format e counts as 30 or more. Smaller e occur in blocks of tiny numbers or zeros. In all other blocks an unsigned code
of 0 stands for 2^(e - 157), not for zero: if a second moment became zero, its first moment would be divided by nearly
zero.

The mantissa is rounded stochastically. x keeps 3 of its 23 mantissa bits, and 20 random bits are added to the other 20
bits,

    s eeeeeeee mmm rrrrrrrrrrrrrrrrrrrr      bits of x (scaled)
     +             nnnnnnnnnnnnnnnnnnnn      noise
    s eeeeeeee mmm ....................      the bits that are kept

so x is rounded up with the probability of its fraction. Then E[decode(encode(x))] = x, and a value that the format
holds exactly is unchanged. Rounding to nearest would lose every change of a moment that is less than 1/16 of the
moment. Below 2^-6, the smallest normal number of e4m3 (2^-13 of the block's maximum or less), steps are 2^-9 and the
signed format rounds to nearest. The unsigned format rounds stochastically at every code above 0.

The second moment v itself is stored, not its root. The table shows v after rounding at every step, relative to the
exact v, for gradients of unit variance, measured on 4,096 weights:

    beta2       v stored: mean, standard deviation              root of v stored, in signed blocks
    0.95        1.00  13 %                                      1.03  25 %
    0.99        1.00  18 %                                      1.05  31 %
    0.999       1.00  20 %                                      1.05  34 %
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqt_dist.config import STATE_BLOCK

# Smallest exponent fields. SIGNED: 2^(134 - e) must be a normal number. UNSIGNED: the shift of the exponents must not
# be negative.
SIGNED_EXPONENT_MIN, UNSIGNED_EXPONENT_MIN = 8, 30
# Mantissa bits of fp32 that are dropped.
DROPPED_BITS = 20


def noise_of(words: Tensor) -> Tensor:
    """int32 noise: the low 20 bits of 32-bit words.

    The rounding of the code makes u from the same word (`philox.to_unit_interval`). The noise and u share 12 bits,
    which change u by less than 2^-12. The rounding of a moment therefore depends on the rounding of the code by at most
    1 part in 4096.
    """
    return (words & ((1 << DROPPED_BITS) - 1)).to(torch.int32)


def encode_signed(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and exponents of x, |x| < 2^120. `noise` has the shape of x."""
    blocks, exponents = _blocks(x)
    y = blocks * _power_of_two(134 - exponents.clamp(min=SIGNED_EXPONENT_MIN))
    bits = y.view(torch.int32) + noise.view_as(y)
    rounded = (bits & (-1 << DROPPED_BITS)).view(torch.float32)
    codes = rounded.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.view(x.shape), exponents.squeeze(-1).to(torch.uint8)


def decode_signed(codes: Tensor, exponents: Tensor) -> Tensor:
    """fp32 [rows, columns], exact."""
    blocks = codes.view(torch.float8_e4m3fn).float().unflatten(1, (-1, STATE_BLOCK))
    scale = _power_of_two(exponents.int().clamp(min=SIGNED_EXPONENT_MIN)[..., None] - 134)
    return (blocks * scale).view(codes.shape)


def encode_unsigned(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and exponents of x, 0 <= x < 2^127. `noise` has the shape of x."""
    blocks, exponents = _blocks(x)
    bits = blocks.view(torch.int32) + noise.view_as(blocks) - _unsigned_shift(exponents)
    codes = (bits.clamp(min=0) >> DROPPED_BITS).to(torch.uint8)
    return codes.view(x.shape), exponents.squeeze(-1).to(torch.uint8)


def decode_unsigned(codes: Tensor, exponents: Tensor) -> Tensor:
    """fp32 [rows, columns], exact."""
    bits = (codes.int() << DROPPED_BITS).unflatten(1, (-1, STATE_BLOCK)) + _unsigned_shift(exponents.int()[..., None])
    return bits.view(torch.float32).view(codes.shape)


def _blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as [rows, blocks, 32], and the exponent field of each block's maximum, int32 [rows, blocks, 1]."""
    blocks = x.unflatten(1, (-1, STATE_BLOCK))
    return blocks, blocks.abs().amax(dim=-1, keepdim=True).view(torch.int32) >> 23


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent for int32 exponents in [-126, 127]."""
    return ((exponent + 127) << 23).view(torch.float32)


def _unsigned_shift(exponents: Tensor) -> Tensor:
    """The number that is subtracted from the bits of a block's values, int32."""
    return (exponents.clamp(min=UNSIGNED_EXPONENT_MIN) - UNSIGNED_EXPONENT_MIN) << 23
