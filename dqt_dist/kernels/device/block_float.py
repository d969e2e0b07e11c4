# pyright: reportMissingImports=false, reportIndexIssue=false
"""Blocks of 8-bit floats as device functions: the formats of lowbit/block_float.py, bit for bit.

    values      fp32  [BLOCK]
    codes       uint8 [BLOCK / STATE_BLOCK, STATE_BLOCK]
    noise       int32 [BLOCK / STATE_BLOCK, STATE_BLOCK]      20 random bits per value
    exponents   int32 [BLOCK / STATE_BLOCK] after encoding, [BLOCK / STATE_BLOCK, 1] before decoding

EXPONENT_MIN is SIGNED_EXPONENT_MIN or UNSIGNED_EXPONENT_MIN of lowbit/block_float.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dqt_dist.kernels.device.instructions import saturated_high_bits, store_low_bytes


@triton.jit
def power_of_two(exponent):
    """2^exponent, fp32, for int32 in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def decode_signed(codes, exponents, factor, BLOCK: tl.constexpr, EXPONENT_MIN: tl.constexpr):
    """Values times the scalar `factor`.

    The factor is multiplied into the scale of each block, so it costs no operation per value.
    """
    scale = power_of_two(tl.maximum(exponents, EXPONENT_MIN) - 134)
    return tl.reshape(codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * (scale * factor), (BLOCK,))


@triton.jit
def decode_unsigned(codes, exponents, BLOCK: tl.constexpr, EXPONENT_MIN: tl.constexpr):
    """Values."""
    shift = (tl.maximum(exponents, EXPONENT_MIN) - EXPONENT_MIN) << 23
    return tl.reshape(((codes.to(tl.int32) << 20) + shift).to(tl.float32, bitcast=True), (BLOCK,))


@triton.jit
def encode_signed(values, noise, EXPONENT_MIN: tl.constexpr):
    """Codes and exponents of values, whose mantissas are rounded by `noise`."""
    blocks = tl.reshape(values, noise.shape)
    exponents = tl.max(tl.abs(blocks), axis=1).to(tl.int32, bitcast=True) >> 23
    scaled = blocks * power_of_two(134 - tl.maximum(exponents, EXPONENT_MIN))[:, None]
    bits = (scaled.to(tl.int32, bitcast=True) + noise) & -1048576  # -2^20
    return bits.to(tl.float32, bitcast=True).to(tl.float8e4nv).to(tl.uint8, bitcast=True), exponents


@triton.jit
def encode_unsigned(values, noise, EXPONENT_MIN: tl.constexpr):
    """Codes and exponents of values that are not negative, whose mantissas are rounded by `noise`."""
    # Numbers that are not negative have the order of their bits, and a GPU takes the maximum of three integers at once.
    bits = tl.reshape(values, noise.shape).to(tl.int32, bitcast=True)
    exponents = tl.max(bits, axis=1) >> 23
    shift = (tl.maximum(exponents, EXPONENT_MIN) - EXPONENT_MIN) << 23
    return saturated_high_bits(bits + noise - shift[:, None]), exponents


@triton.jit
def load_blocks(
    codes_row, exponents_row, start, columns, BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """Codes and exponents of columns [start, start + BLOCK) of a row; zeros past `columns`.

    WHOLE: the block lies inside the row.
    """
    code_pointers = (codes_row + start) + tl.arange(0, BLOCK)
    exponent_pointers = (exponents_row + start // STATE_BLOCK) + tl.arange(0, BLOCK // STATE_BLOCK)
    if WHOLE:
        codes, exponents = tl.load(code_pointers), tl.load(exponent_pointers)
    else:
        codes = tl.load(code_pointers, mask=tl.arange(0, BLOCK) < columns - start, other=0)
        inside = tl.arange(0, BLOCK // STATE_BLOCK) < (columns - start) // STATE_BLOCK
        exponents = tl.load(exponent_pointers, mask=inside, other=0)
    return tl.reshape(codes, (BLOCK // STATE_BLOCK, STATE_BLOCK)), exponents.to(tl.int32)[:, None]


@triton.jit
def store_blocks(
    codes_row, exponents_row, codes, exponents, start, columns, BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_blocks`; exponents [BLOCK / STATE_BLOCK]."""
    code_pointers = (codes_row + start) + tl.arange(0, BLOCK)
    exponent_pointers = (exponents_row + start // STATE_BLOCK) + tl.arange(0, BLOCK // STATE_BLOCK)
    codes = tl.reshape(codes, (BLOCK,))
    if WHOLE:
        tl.store(code_pointers, codes)
        store_low_bytes(exponent_pointers, exponents)
    else:
        tl.store(code_pointers, codes, mask=tl.arange(0, BLOCK) < columns - start)
        inside = tl.arange(0, BLOCK // STATE_BLOCK) < (columns - start) // STATE_BLOCK
        tl.store(exponent_pointers, exponents.to(tl.uint8), mask=inside)
