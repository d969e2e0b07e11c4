# pyright: reportMissingImports=false, reportIndexIssue=false
"""Rounding as device functions: fields of a grid, stochastically or to nearest, and small fp32 numbers to integers."""

from __future__ import annotations

import triton
import triton.language as tl

from dqt_dist.kernels.device.instructions import add_up, fma_up, uint32_to_float_down

# 1.5 * 2^23. The fp32 numbers around ROUNDER are the integers, and its lowest 22 bits are zero. So adding a number
# below 2^22 rounds this number to an integer, and leaves the integer in the lowest bits of the sum.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def round_to_integer(x):
    """fp32 x of magnitude below 2^22 to a whole number, half to even."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def round_fields(t, words, QMIN: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Wanted fields t, fp32 [BLOCK] inside the grid, to whole ones: int32 [BLOCK] with the bits of ROUNDER added.

    Stochastic: floor(t) + [u < t - floor(t)] is the smallest integer that is not below t - u. Two sums that are rounded
    towards +infinity find this integer. The first sum is t - u. The second adds ROUNDER, whose neighbours are integers,
    so the field is left in the lowest bits.

    u has the first 24 binary digits of a word of `words`, uint32 [BLOCK], counted from the highest digit that is set.
    So a t with more than 24 digits behind the point is rounded up with the right probability too.
    """
    if STOCHASTIC:
        digits = uint32_to_float_down(words)
        minus_2_to_minus_32: tl.constexpr = -2.3283064365386963e-10
        bits = add_up(fma_up(digits, minus_2_to_minus_32, t), ROUNDER).to(tl.int32, bitcast=True)
    else:
        # To nearest, half to an even code. Adding QMIN as well makes the sum round the code instead of the field.
        bits = (t + (ROUNDER + QMIN)).to(tl.int32, bitcast=True) - QMIN
    return bits
