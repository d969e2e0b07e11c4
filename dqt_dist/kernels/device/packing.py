# Triton may be absent. Its types know no index into a jit function, and no arithmetic of a constexpr.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false
"""Packed codes as device functions: the byte layout of lowbit/packing.py.

    storage bits   group                                             field
    2              1 byte    u0 | u1 << 2 | u2 << 4 | u3 << 6        u = code - QMIN
    4              1 byte    u0 | u1 << 4                            u = code - QMIN
    6              3 bytes   u0 | u1 << 6 | u2 << 12 | u3 << 18      u = code - QMIN, the lowest byte first
    8              1 byte    the code itself as int8                 u = code - QMIN, once it is loaded

A *field* is a code less QMIN, so a field is never negative. A *group* is the fewest neighbouring fields that fill whole
bytes; in registers it is one int32, whose lowest bits are the bytes. A row ends on a group. Fields of the last group
that belong to no column are zero.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from dqt_dist.kernels.device.instructions import population_count


@triton.jit
def interleave4(a, b, c, d):
    """[a0, b0, c0, d0, a1, ...]"""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.constexpr_function
def group_codes(storage_bits):
    """Codes of a group, `Grid.group_codes`."""
    return 8 // math.gcd(8, storage_bits)


@triton.constexpr_function
def group_bytes(storage_bits):
    """Bytes of a group, `Grid.group_bytes`."""
    return storage_bits // math.gcd(8, storage_bits)


@triton.jit
def load_groups(first_bytes, inside, STORAGE_BITS: tl.constexpr):
    """Groups, int32, at pointers to their first bytes; zero where not `inside`. None: all are inside."""
    other = None if inside is None else 0
    groups = tl.load(first_bytes, mask=inside, other=other).to(tl.int32)
    for byte in tl.static_range(1, group_bytes(STORAGE_BITS)):
        groups |= tl.load(first_bytes + byte, mask=inside, other=other).to(tl.int32) << (8 * byte)
    return groups


@triton.jit
def _bytes_of_groups(start, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Where the groups of columns [start, start + BLOCK) lie in a row: the first byte of the first group, and how far
    the first byte of each group is behind it, int32 [BLOCK / codes of a group]."""
    GROUP_BYTES: tl.constexpr = group_bytes(STORAGE_BITS)
    GROUP_CODES: tl.constexpr = group_codes(STORAGE_BITS)
    return start // GROUP_CODES * GROUP_BYTES, tl.arange(0, BLOCK // GROUP_CODES) * GROUP_BYTES


@triton.jit
def load_packed(
    codes_row, start, packed_columns, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Groups of columns [start, start + BLOCK) of a row: int32 [BLOCK / codes of a group].

    Past `packed_columns`, the bytes of a row, every field is zero. WHOLE: the block lies inside the row.
    """
    first, offsets = _bytes_of_groups(start, STORAGE_BITS, BLOCK)
    inside = None if WHOLE else offsets < packed_columns - first
    packed = load_groups((codes_row + first) + offsets, inside, STORAGE_BITS)
    if STORAGE_BITS == 8 and not WHOLE:
        # Not by `other`: of four int8 that are loaded at once, Triton 3.6.0 gives a negative `other` to the first only.
        packed = tl.where(inside, packed, QMIN)
    return packed


@triton.jit
def store_packed(
    codes_row, packed, start, packed_columns, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """The inverse of `load_packed`; groups past `packed_columns` are dropped."""
    first, offsets = _bytes_of_groups(start, STORAGE_BITS, BLOCK)
    inside = None if WHOLE else offsets < packed_columns - first
    pointers = (codes_row + first) + offsets
    for byte in tl.static_range(group_bytes(STORAGE_BITS)):
        tl.store(pointers + byte, (packed >> (8 * byte)).to(codes_row.dtype.element_ty), mask=inside)


@triton.jit
def _field(packed, POSITION: tl.constexpr, STORAGE_BITS: tl.constexpr):
    """Field POSITION of each group, as fp32.

    The groups get the exponent of 2^23, whose bits are 0x4B000000. With this exponent the last bit of the mantissa is
    worth one, so the 32 bits are the fp32 number 2^23 + group, for instance of one byte:

        sign 0   exponent 10010110   mantissa 000000000000000 uuuuuuuu

    Masking the other fields leaves 2^23 + u * 2^SHIFT. One fused multiply-add removes both powers of two. A field that
    would reach into the exponent, the last one of three bytes, is first moved to the lowest bits.
    """
    REACHES_EXPONENT: tl.constexpr = STORAGE_BITS * (POSITION + 1) > 23
    SHIFT: tl.constexpr = 0 if REACHES_EXPONENT else STORAGE_BITS * POSITION
    UNIT: tl.constexpr = 1.0 / (1 << SHIFT)
    if REACHES_EXPONENT:
        packed = packed >> (STORAGE_BITS * POSITION)
    bits = (packed | 0x4B000000) & (0x7F000000 | ((1 << STORAGE_BITS) - 1) << SHIFT)
    return bits.to(tl.float32, bitcast=True) * UNIT - 8388608.0 * UNIT


@triton.jit
def unpack_fields(packed, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr):
    """Fields of groups, fp32 [BLOCK]: no conversion from integers, which is slow on a GPU."""
    # One return statement: Triton checks the type of every return, also of one that a constexpr condition leaves out.
    if STORAGE_BITS == 8:
        result = packed.to(tl.float32) - QMIN
    elif STORAGE_BITS == 4:
        result = tl.interleave(_field(packed, 0, 4), _field(packed, 1, 4))
    else:
        result = interleave4(
            _field(packed, 0, STORAGE_BITS),
            _field(packed, 1, STORAGE_BITS),
            _field(packed, 2, STORAGE_BITS),
            _field(packed, 3, STORAGE_BITS),
        )
    return result


@triton.jit
def unpack_codes(packed, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr):
    """Codes of groups [rows, n], int32 [rows, n * codes of a group].

    These are integers, unlike the result of `unpack_fields`. A kernel that only unpacks is limited by memory, so it can
    afford to convert them to any operand type.
    """
    MASK: tl.constexpr = (1 << STORAGE_BITS) - 1
    if STORAGE_BITS == 8:
        codes = packed
    elif STORAGE_BITS == 4:
        codes = tl.interleave(packed & MASK, (packed >> 4) & MASK) + QMIN
    else:
        codes = (
            interleave4(
                packed & MASK,
                (packed >> STORAGE_BITS) & MASK,
                (packed >> 2 * STORAGE_BITS) & MASK,
                (packed >> 3 * STORAGE_BITS) & MASK,
            )
            + QMIN
        )
    return codes


@triton.jit
def pack_fields(fields, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Groups, int32, of int32 fields [BLOCK]; a multiple of 2^16 that is added to a field does not matter."""
    GROUP_CODES: tl.constexpr = group_codes(STORAGE_BITS)
    GROUP_BITS: tl.constexpr = 8 * group_bytes(STORAGE_BITS)
    if STORAGE_BITS == 8:
        result = fields + QMIN
    else:
        if GROUP_BITS > 16:
            # Only a group of one byte lies below what may be added to its fields.
            fields = fields & ((1 << STORAGE_BITS) - 1)
        shifts = tl.arange(0, GROUP_CODES) * STORAGE_BITS
        result = tl.sum(tl.reshape(fields, (BLOCK // GROUP_CODES, GROUP_CODES)) << shifts[None, :], axis=1)
    return result & ((1 << GROUP_BITS) - 1)


@triton.jit
def group_of_zero_codes(QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr):
    """The group whose codes are all zero."""
    return 0 if STORAGE_BITS == 8 else -QMIN * _ones(STORAGE_BITS)


@triton.constexpr_function
def _ones(storage_bits):
    """The group whose fields are all 1: 0x55, 0x11, 0x41041 or 1."""
    return ((1 << 8 * storage_bits // math.gcd(8, storage_bits)) - 1) // ((1 << storage_bits) - 1)


@triton.jit
def count_nonzero_fields(packed, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of 8 neighbouring fields of groups are not zero: int32 [BLOCK / 8].

    Each field is reduced to its lowest bit, the groups of 8 fields are put into one word, and the word's bits are
    counted.
    """
    if STORAGE_BITS == 8:
        bits = tl.where((packed & 255) != 0, 1, 0)
    elif STORAGE_BITS == 6:
        bits = packed | (packed >> 3)
        bits = bits | (bits >> 1) | (bits >> 2)
    elif STORAGE_BITS == 4:
        bits = packed | (packed >> 2)
        bits = bits | (bits >> 1)
    else:
        bits = packed | (packed >> 1)
    # Bits are STORAGE_BITS apart, and 8 fields are no more groups than that: a shift by one keeps them apart.
    GROUPS: tl.constexpr = 8 // group_codes(STORAGE_BITS)
    words = tl.reshape(bits & _ones(STORAGE_BITS), (BLOCK // 8, GROUPS))
    return population_count(tl.sum(words << tl.arange(0, GROUPS)[None, :], axis=1))
