# Triton may be absent. Its types know no index into a jit function, and no arithmetic of a constexpr.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportOperatorIssue=false
"""Packed codes as device functions: the byte layout of lowbit/packing.py.

    storage bits   byte                                    field
    2              u0 | u1 << 2 | u2 << 4 | u3 << 6        u = code - QMIN
    4              u0 | u1 << 4                            u = code - QMIN
    8              the code itself as int8                 u = code - QMIN, once it is loaded

A *field* is a code less QMIN, so a field is never negative. A row ends on a byte. Fields of the last byte that belong
to no column are zero. Bytes are int32 in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dqt_dist.kernels.device.instructions import population_count


@triton.jit
def interleave4(a, b, c, d):
    """[a0, b0, c0, d0, a1, ...]"""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def load_packed(
    codes_row, start, packed_columns, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Bytes of columns [start, start + BLOCK) of a row: int32 [BLOCK * STORAGE_BITS / 8].

    Past `packed_columns`, the bytes of a row, every field is zero. WHOLE: the block lies inside the row.
    """
    COUNT: tl.constexpr = BLOCK * STORAGE_BITS // 8
    first = start // (8 // STORAGE_BITS)
    pointers = (codes_row + first) + tl.arange(0, COUNT)
    if WHOLE:
        packed = tl.load(pointers).to(tl.int32)
    else:
        inside = tl.arange(0, COUNT) < packed_columns - first
        packed = tl.load(pointers, mask=inside, other=0).to(tl.int32)
        if STORAGE_BITS == 8:
            # Not by `other`: of four int8 that are loaded at once, Triton 3.6.0 gives a negative `other` to the
            # first only.
            packed = tl.where(inside, packed, QMIN)
    return packed


@triton.jit
def store_packed(
    codes_row, packed, start, packed_columns, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """The inverse of `load_packed`; bytes past `packed_columns` are dropped."""
    COUNT: tl.constexpr = BLOCK * STORAGE_BITS // 8
    first = start // (8 // STORAGE_BITS)
    inside = None if WHOLE else tl.arange(0, COUNT) < packed_columns - first
    tl.store((codes_row + first) + tl.arange(0, COUNT), packed.to(codes_row.dtype.element_ty), mask=inside)


@triton.jit
def _field(bytes_with_exponent, POSITION: tl.constexpr, STORAGE_BITS: tl.constexpr):
    """Field POSITION of each byte, as fp32.

    The bytes come with the exponent of 2^23, whose bits are 0x4B000000. With this exponent the last bit of the mantissa
    is worth one, so the 32 bits are the fp32 number 2^23 + byte:

        sign 0   exponent 10010110   mantissa 000000000000000 uuuuuuuu

    Masking the other fields leaves 2^23 + u * 2^SHIFT. One fused multiply-add removes both powers of two.
    """
    SHIFT: tl.constexpr = STORAGE_BITS * POSITION
    UNIT: tl.constexpr = 1.0 / (1 << SHIFT)
    bits = bytes_with_exponent & (0x7F000000 | ((1 << STORAGE_BITS) - 1) << SHIFT)
    return bits.to(tl.float32, bitcast=True) * UNIT - 8388608.0 * UNIT


@triton.jit
def unpack_fields(packed, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr):
    """Fields of bytes, fp32 [BLOCK]: no conversion from integers, which is slow on a GPU."""
    bytes_with_exponent = packed | 0x4B000000
    # One return statement: Triton checks the type of every return, also of one that a constexpr condition leaves out.
    if STORAGE_BITS == 8:
        result = packed.to(tl.float32) - QMIN
    elif STORAGE_BITS == 4:
        result = tl.interleave(_field(bytes_with_exponent, 0, 4), _field(bytes_with_exponent, 1, 4))
    else:
        result = interleave4(
            _field(bytes_with_exponent, 0, 2),
            _field(bytes_with_exponent, 1, 2),
            _field(bytes_with_exponent, 2, 2),
            _field(bytes_with_exponent, 3, 2),
        )
    return result


@triton.jit
def unpack_codes(packed, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr):
    """Codes of bytes [rows, n], int32 [rows, n * 8 / STORAGE_BITS].

    These are integers, unlike the result of `unpack_fields`. A kernel that only unpacks is limited by memory, so it can
    afford to convert them to any operand type.
    """
    if STORAGE_BITS == 8:
        codes = packed
    elif STORAGE_BITS == 4:
        codes = tl.interleave(packed & 15, (packed >> 4) & 15) + QMIN
    else:
        even = tl.interleave(packed & 3, (packed >> 4) & 3)
        odd = tl.interleave((packed >> 2) & 3, (packed >> 6) & 3)
        codes = tl.interleave(even, odd) + QMIN
    return codes


@triton.jit
def pack_fields(fields, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Bytes, int32, of int32 fields [BLOCK]; a multiple of 2^16 that is added to a field does not matter."""
    PER_BYTE: tl.constexpr = 8 // STORAGE_BITS
    if STORAGE_BITS == 8:
        result = fields + QMIN
    else:
        shifts = tl.arange(0, PER_BYTE) * STORAGE_BITS
        result = tl.sum(tl.reshape(fields, (BLOCK // PER_BYTE, PER_BYTE)) << shifts[None, :], axis=1)
    return result & 255


@triton.jit
def byte_of_zero_codes(QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr):
    """The byte whose codes are all zero."""
    return 0 if STORAGE_BITS == 8 else -QMIN * (255 // ((1 << STORAGE_BITS) - 1))


@triton.jit
def count_nonzero_fields(packed, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of 8 neighbouring fields of bytes are not zero: int32 [BLOCK / 8].

    Each field is reduced to one bit, the bytes of 8 fields are put into one word, and the word's bits are counted.
    """
    if STORAGE_BITS == 8:
        bits = tl.where((packed & 255) != 0, 1, 0)
    elif STORAGE_BITS == 4:
        bits = packed | (packed >> 2)
        bits = (bits | (bits >> 1)) & 0x11
    else:
        bits = (packed | (packed >> 1)) & 0x55
    # STORAGE_BITS bytes hold 8 fields.
    words = tl.reshape(bits, (BLOCK // 8, STORAGE_BITS))
    shifts = tl.arange(0, STORAGE_BITS) * 8 if STORAGE_BITS < 8 else tl.arange(0, STORAGE_BITS)
    return population_count(tl.sum(words << shifts[None, :], axis=1))
