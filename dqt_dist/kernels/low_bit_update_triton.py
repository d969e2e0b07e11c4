# pyright: reportMissingImports=false, reportIndexIssue=false
"""The rounding update in Triton, from a direction or with AdamW in the same pass; packed codes are rewritten in place.

    update_rows_triton         direction in                             definition: lowbit/update.py, update_rows_reference
    adamw_update_rows_triton   gradient and moments in, moments out     definition: optim/adamw.py, adamw_update_rows_reference

Both draw the same 32-bit words as their definitions and differ from them only where fp32 arithmetic is contracted to fused
multiply-adds or counts the wanted weight from the lowest code instead of from zero, where a root or quotient is approximate, and
where u is small and has more digits here (`_round`): each decides otherwise about one draw in 2^20, and nothing where t is exact.

Bytes a ternary weight: 1/4 of codes read and written; a direction of 4 read; or a gradient of 2 (bf16) read and moments of 2.0625
(16 of fp32: 8) read and written, 6.6 in all. With 8-bit moments an H200 is busier with instructions than with these bytes, so they
count: 52 a weight for ternary codes, 10 of them Philox, of which one call serves both the codes and the moments of four weights
(docs/benchmarks/kernels.md has what each costs). Some are PTX, where Triton has no word for what the GPU does in one.

One program walks one row, or a part of it where rows are few: matrix, scale and first element index are scalars, and counts need no
atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from dqt_dist.config import STATE_BLOCK
from dqt_dist.kernels.launch import launch
from dqt_dist.lowbit.block_float import SIGNED_EXPONENT_MIN, UNSIGNED_EXPONENT_MIN
from dqt_dist.lowbit.coordinates import Purpose, row_words
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import RoundingKey

# Columns a program handles at once, a power of two, and its warps: 8 columns a thread, a 16-byte load of a bf16 gradient. One warp
# needs no barriers, and 256 divides more row lengths than larger blocks do.
BLOCK, NUM_WARPS = 256, 1
# Rows are cut until there are so many programs, four for each of the 32 places on 132 multiprocessors, or so few blocks in one.
PROGRAMS, BLOCKS_AT_LEAST = 1 << 14, 4

# 1.5 * 2^23: fp32's neighbours of it are integers, and its lowest 22 bits are zero.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _interleave4(a, b, c, d):
    """[a0, b0, c0, d0, a1, ...]"""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _load_packed(
    codes_row, start, packed_columns, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Packed bytes from column `start` on, int32 [BLOCK * STORAGE_BITS / 8]; fields of zero past the end."""
    COUNT: tl.constexpr = BLOCK * STORAGE_BITS // 8
    first = start // (8 // STORAGE_BITS)
    packed_at = (codes_row + first) + tl.arange(0, COUNT)
    if WHOLE:
        packed = tl.load(packed_at).to(tl.int32)
    else:
        inside = tl.arange(0, COUNT) < packed_columns - first
        packed = tl.load(packed_at, mask=inside, other=0).to(tl.int32)
        if STORAGE_BITS == 8:
            # Not by `other`: of four int8 loaded at once, Triton 3.6.0 gives a negative one to the first alone.
            packed = tl.where(inside, packed, QMIN)
    return packed


@triton.jit
def _store_packed(
    codes_row, packed, start, packed_columns, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    COUNT: tl.constexpr = BLOCK * STORAGE_BITS // 8
    first = start // (8 // STORAGE_BITS)
    inside = None if WHOLE else tl.arange(0, COUNT) < packed_columns - first
    tl.store((codes_row + first) + tl.arange(0, COUNT), packed.to(codes_row.dtype.element_ty), mask=inside)


@triton.jit
def _field(on_top, POSITION: tl.constexpr, STORAGE_BITS: tl.constexpr):
    """Field POSITION of packed bytes, fp32. They come or-ed with the bits of 2^23; in its mantissa a field counts 2^SHIFT."""
    SHIFT: tl.constexpr = STORAGE_BITS * POSITION
    UNIT: tl.constexpr = 1.0 / (1 << SHIFT)
    bits = on_top & (0x7F000000 | ((1 << STORAGE_BITS) - 1) << SHIFT)
    return bits.to(tl.float32, bitcast=True) * UNIT - 8388608.0 * UNIT


@triton.jit
def _fields(packed, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr):
    """Codes less QMIN, fp32, of packed bytes."""
    on_top = packed | 0x4B000000
    # One return: Triton types every return statement, also those a constexpr condition leaves out.
    if STORAGE_BITS == 8:
        result = packed.to(tl.float32) - QMIN
    elif STORAGE_BITS == 4:
        result = tl.interleave(_field(on_top, 0, 4), _field(on_top, 1, 4))
    else:
        result = _interleave4(_field(on_top, 0, 2), _field(on_top, 1, 2), _field(on_top, 2, 2), _field(on_top, 3, 2))
    return result


@triton.jit
def _packed(fields, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse for int32 fields [BLOCK], which may have a multiple of 2^16 added; as bytes, int32."""
    PER_BYTE: tl.constexpr = 8 // STORAGE_BITS
    if STORAGE_BITS == 8:
        result = fields + QMIN
    else:
        places = tl.arange(0, PER_BYTE) * STORAGE_BITS
        result = tl.sum(tl.reshape(fields, (BLOCK // PER_BYTE, PER_BYTE)) << places[None, :], axis=1)
    return result & 255


@triton.jit
def _philox(key, counter, step, id_word):
    """The four words of counters below 2^32, key = second word << 32 | first (lowbit/coordinates.py). tl.philox would take the halves
    of each product by an instruction of its own; with the upper words of the counter the same everywhere, two of the twenty
    products are scalars."""
    c0, c1, c2, c3 = counter, tl.zeros_like(counter), step.to(tl.uint32), id_word
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_1 >> 32).to(tl.uint32) ^ (c1 ^ k0)
        c2 = (product_0 >> 32).to(tl.uint32) ^ (c3 ^ k1)
        c1 = product_1.to(tl.uint32)
        c3 = product_0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _draw(counter, id_word, key, step, BLOCK: tl.constexpr):
    """The 32-bit words of BLOCK neighbouring elements, of which `counter` gives the first four: uint32 [BLOCK]."""
    # Two counters for the 8 columns of a thread: words are where they are used.
    pair = counter.to(tl.uint32) + 2 * tl.arange(0, BLOCK // 8).to(tl.uint32)
    a0, a1, a2, a3 = _philox(key, pair, step, id_word)
    b0, b1, b2, b3 = _philox(key, pair + 1, step, id_word)
    return _interleave4(tl.interleave(a0, b0), tl.interleave(a1, b1), tl.interleave(a2, b2), tl.interleave(a3, b3))


@triton.jit
def _clamped(x, SPAN: tl.constexpr):
    """fp32 x between 0 and SPAN, by one instruction: numbers that are not negative are ordered as their bits are."""
    return tl.inline_asm_elementwise(
        "min.s32.relu $0, $1, $2;", "=r,r,r", [x, tl.full(x.shape, SPAN, tl.float32)],
        dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _round(inside_grid, words, QMIN: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Fields t inside the grid to whole ones, int32 [BLOCK] with the bits of ROUNDER added.

    floor(t) + [u < t - floor(t)] is the smallest integer that is not below t - u. Sums rounded towards +inf never fall below it: one
    with -u, one with a number whose neighbours are integers, which leaves the field in its lowest bits. u has the first 24 binary
    digits of a word, from its highest that is set, so that an fp32 t with more than 24 of them is served too.
    """
    if STOCHASTIC:
        digits = tl.inline_asm_elementwise(
            "cvt.rz.f32.u32 $0, $1;", "=f,r", [words], dtype=tl.float32, is_pure=True, pack=1
        )
        result = libdevice.add_ru(libdevice.fma_ru(digits, -2.3283064365386963e-10, inside_grid), ROUNDER)  # 2^-32
        bits = result.to(tl.int32, bitcast=True)
    else:
        # To nearest, half to an even code.
        bits = (inside_grid + (ROUNDER + QMIN)).to(tl.int32, bitcast=True) - QMIN
    return bits


@triton.jit
def _land(
    codes_row,
    old,
    wanted,
    words,
    start,
    columns,
    packed_columns,
    STOCHASTIC: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    STORAGE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Rounds wanted fields [BLOCK], which are finite, and stores them over `old`, packed. Returns flips, zeros and clamped weights:
    int32, int32 and fp32 [BLOCK / 8]."""
    inside_grid = _clamped(wanted, QMAX - QMIN)
    new = _round(inside_grid, words, QMIN, STOCHASTIC)
    clamped = tl.where(inside_grid != wanted, 1.0, 0.0)
    if not WHOLE:
        inside = start + tl.arange(0, BLOCK) < columns
        clamped = tl.where(inside, clamped, 0.0)
        # Columns past the end keep a zero field, as packing leaves it.
        new = tl.where(inside, new, 0)
    new = _packed(new, QMIN, STORAGE_BITS, BLOCK)
    _store_packed(codes_row, new, start, packed_columns, STORAGE_BITS, BLOCK, WHOLE)
    zeros = 8 - _fields_set(new ^ _zero_fields(QMIN, STORAGE_BITS), STORAGE_BITS, BLOCK)
    return _fields_set(old ^ new, STORAGE_BITS, BLOCK), zeros, tl.sum(tl.reshape(clamped, (BLOCK // 8, 8)), axis=1)


@triton.jit
def _zero_fields(QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr):
    """A byte of zero codes."""
    return 0 if STORAGE_BITS == 8 else -QMIN * (255 // ((1 << STORAGE_BITS) - 1))


@triton.jit
def _fields_set(packed, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """How many fields of 8 neighbours are not zero, int32 [BLOCK / 8], of packed bytes."""
    if STORAGE_BITS == 8:
        bits = tl.where((packed & 255) != 0, 1, 0)
    elif STORAGE_BITS == 4:
        # Four bytes hold the 8 fields.
        bits = packed | (packed >> 2)
        bits = (bits | (bits >> 1)) & 0x11
    else:
        bits = (packed | (packed >> 1)) & 0x55
    words = tl.reshape(bits, (BLOCK // 8, STORAGE_BITS))
    places = tl.arange(0, STORAGE_BITS) * 8 if STORAGE_BITS < 8 else tl.arange(0, STORAGE_BITS)
    return libdevice.popc(tl.sum(words << places[None, :], axis=1))


@triton.jit
def _decayed(fields, decay_factor, QMIN: tl.constexpr):
    """Fields of codes times a factor."""
    return fields * decay_factor + (QMIN * decay_factor - QMIN)


@triton.jit
def _place(first_element, matrix_id, columns, segment):
    """Where this program is: its row, first and last column, the counter of the row's first four elements, the matrix."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * segment
    counter = (tl.load(first_element + row) >> 2).to(tl.int32)
    return row, first, tl.minimum(columns, first + segment), counter, tl.load(matrix_id + row).to(tl.uint32)


@triton.jit
def _no_counts(BLOCK: tl.constexpr):
    """Flips, zeros and clamped weights, as `_land` returns them."""
    none = tl.zeros((BLOCK // 8,), tl.int32)
    return none, none, none.to(tl.float32)


@triton.jit
def _store_counts(counts, flips, zeros, clamped):
    """Counts of this program; fp32 holds them exactly."""
    own = counts + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 3
    tl.store(own, tl.sum(flips))
    tl.store(own + 1, tl.sum(zeros))
    tl.store(own + 2, tl.sum(clamped).to(tl.int32))


# Unspecialised: a step of 1 or a multiple of 16 would otherwise compile the kernel anew.
@triton.jit(do_not_specialize=["key", "step"])
def _update_kernel(
    codes,
    direction,
    first_element,
    matrix_id,
    row_scale,
    counts,
    learning_rate,
    decay_factor,
    key,
    step,
    columns,
    packed_columns,
    segment,
    STOCHASTIC: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    STORAGE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row, first, last, first_counter, id_word = _place(first_element, matrix_id, columns, segment)
    rate = learning_rate / tl.load(row_scale + row)
    codes_row = codes + row * packed_columns
    direction_row = direction + row * columns
    flips, zeros, clamped = _no_counts(BLOCK)
    for start in range(first, last, BLOCK):
        tl.assume(start >= 0)  # divisions are shifts then
        offsets = start + tl.arange(0, BLOCK)
        inside = None if WHOLE else offsets < columns
        old = _load_packed(codes_row, start, packed_columns, QMIN, STORAGE_BITS, BLOCK, WHOLE)
        fields = _fields(old, QMIN, STORAGE_BITS)
        wanted = _decayed(fields, decay_factor, QMIN) - tl.load(direction_row + offsets, mask=inside) * rate
        wanted = tl.where(tl.abs(wanted) < float("inf"), wanted, fields)
        words = _draw(first_counter + (start >> 2), id_word, key, step, BLOCK)
        new_flips, new_zeros, new_clamped = _land(
            codes_row, old, wanted, words, start, columns, packed_columns,
            STOCHASTIC, QMIN, QMAX, STORAGE_BITS, BLOCK, WHOLE,
        )  # fmt: skip
        flips += new_flips
        zeros += new_zeros
        clamped += new_clamped
    _store_counts(counts, flips, zeros, clamped)


def update_rows_triton(
    weight: LowBitMatrix,
    direction: Tensor,
    start: int,
    learning_rate: float,
    weight_decay: float,
    key: RoundingKey,
) -> Tensor:
    """As `update_rows_reference`, counts in parts; `direction` contiguous, on the device of the codes."""
    assert direction.dtype == torch.float32 and direction.is_contiguous()
    rows = direction.shape[0]
    counts, walk = _walk(weight, rows, key)
    launch(
        _update_kernel,
        tuple(counts.shape[:2]),
        weight.packed(start, start + rows),
        direction,
        *_row_facts(weight, start, start + rows),
        counts,
        learning_rate,
        1.0 - learning_rate * weight_decay,
        *walk,
        **_constants(weight, key),
    )
    return counts


def _walk(weight: LowBitMatrix, rows: int, key: RoundingKey) -> tuple[Tensor, tuple[int, ...]]:
    """A place for the counts, int32 [rows, programs of a row, 3], which is the grid as well; and the kernels' arguments from `key` on.

    The last of them is `segment`: columns that one program walks, a multiple of BLOCK.
    """
    num_blocks = triton.cdiv(weight.columns, BLOCK)
    blocks = max(BLOCKS_AT_LEAST, triton.cdiv(num_blocks, triton.cdiv(PROGRAMS, rows)))
    counts = torch.empty(rows, triton.cdiv(num_blocks, blocks), 3, dtype=torch.int32, device=weight.codes.device)
    key_word = int(Purpose.ROUND) << 32 | key.seed
    return counts, (key_word, key.step, weight.columns, weight.codes.shape[1], blocks * BLOCK)


def _row_facts(weight: LowBitMatrix, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """First element index, matrix id and scale of each row."""
    assert weight.layout is not None
    first_element, matrix_id = row_words(weight.layout, weight.codes.device)
    return first_element[start:stop], matrix_id[start:stop], weight.row_scale()[start:stop]


def _constants(weight: LowBitMatrix, key: RoundingKey) -> dict[str, int | bool]:
    grid = weight.grid
    return {
        "STOCHASTIC": key.mode == "stochastic",
        "QMIN": grid.qmin,
        "QMAX": grid.qmax,
        "STORAGE_BITS": grid.storage_bits,
        "BLOCK": BLOCK,
        "WHOLE": weight.columns % BLOCK == 0,
        "num_warps": NUM_WARPS,
    }


# ---- with AdamW ----


@triton.jit
def _power_of_two(exponent):
    """2^exponent for int32 in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


# The formats of lowbit/block_float.py: codes and noise are [BLOCK / STATE_BLOCK, STATE_BLOCK], exponents int32 [BLOCK / STATE_BLOCK]
# after encoding and [BLOCK / STATE_BLOCK, 1] before decoding, values fp32 [BLOCK].


@triton.jit
def _decode_signed(codes, exponents, factor, BLOCK: tl.constexpr, EXPONENT_MIN: tl.constexpr):
    """Values times `factor`, which the blocks' scales take in."""
    scale = _power_of_two(tl.maximum(exponents, EXPONENT_MIN) - 134)
    return tl.reshape(codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * (scale * factor), (BLOCK,))


@triton.jit
def _decode_unsigned(codes, exponents, BLOCK: tl.constexpr, EXPONENT_MIN: tl.constexpr):
    shift = (tl.maximum(exponents, EXPONENT_MIN) - EXPONENT_MIN) << 23
    return tl.reshape(((codes.to(tl.int32) << 20) + shift).to(tl.float32, bitcast=True), (BLOCK,))


@triton.jit
def _encode_signed(values, noise, EXPONENT_MIN: tl.constexpr):
    """Codes uint8 and exponents."""
    blocks = tl.reshape(values, noise.shape)
    exponents = tl.max(tl.abs(blocks), axis=1).to(tl.int32, bitcast=True) >> 23
    scaled = blocks * _power_of_two(134 - tl.maximum(exponents, EXPONENT_MIN))[:, None]
    bits = (scaled.to(tl.int32, bitcast=True) + noise) & -1048576  # -2^20
    return bits.to(tl.float32, bitcast=True).to(tl.float8e4nv).to(tl.uint8, bitcast=True), exponents


@triton.jit
def _encode_unsigned(values, noise, EXPONENT_MIN: tl.constexpr):
    """Codes uint8 and exponents."""
    # Not negative, so ordered as their bits, of which a GPU takes the maximum of three at once.
    bits = tl.reshape(values, noise.shape).to(tl.int32, bitcast=True)
    exponents = tl.max(bits, axis=1) >> 23
    shift = (tl.maximum(exponents, EXPONENT_MIN) - EXPONENT_MIN) << 23
    return _saturated(bits + noise - shift[:, None]), exponents


@triton.jit
def _load_blocks(
    codes_row, exponents_row, start, columns, BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """Codes uint8 [BLOCK / STATE_BLOCK, STATE_BLOCK] and exponents int32 [BLOCK / STATE_BLOCK, 1]."""
    codes_at = (codes_row + start) + tl.arange(0, BLOCK)
    exponents_at = (exponents_row + start // STATE_BLOCK) + tl.arange(0, BLOCK // STATE_BLOCK)
    if WHOLE:
        codes, exponents = tl.load(codes_at), tl.load(exponents_at)
    else:
        codes = tl.load(codes_at, mask=tl.arange(0, BLOCK) < columns - start, other=0)
        inside = tl.arange(0, BLOCK // STATE_BLOCK) < (columns - start) // STATE_BLOCK
        exponents = tl.load(exponents_at, mask=inside, other=0)
    return tl.reshape(codes, (BLOCK // STATE_BLOCK, STATE_BLOCK)), exponents.to(tl.int32)[:, None]


@triton.jit
def _store_blocks(
    codes_row, exponents_row, codes, exponents, start, columns, BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The inverse of `_load_blocks`; exponents [BLOCK / STATE_BLOCK]."""
    codes_at = (codes_row + start) + tl.arange(0, BLOCK)
    exponents_at = (exponents_row + start // STATE_BLOCK) + tl.arange(0, BLOCK // STATE_BLOCK)
    codes = tl.reshape(codes, (BLOCK,))
    if WHOLE:
        tl.store(codes_at, codes)
        # As it stands: tl.store would first move these few between threads.
        tl.inline_asm_elementwise(
            "st.global.u8 [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [exponents_at, exponents],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(codes_at, codes, mask=tl.arange(0, BLOCK) < columns - start)
        inside = tl.arange(0, BLOCK // STATE_BLOCK) < (columns - start) // STATE_BLOCK
        tl.store(exponents_at, exponents.to(tl.uint8), mask=inside)


@triton.jit
def _load_moments(
    exp_avg_row, exp_avg_scale_row, second_row, second_scale_row, start, columns, beta1, STATE_BITS: tl.constexpr,
    STATE_BLOCK: tl.constexpr, SIGNED_EXPONENT_MIN: tl.constexpr, UNSIGNED_EXPONENT_MIN: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """First moment times beta1, and second moment: fp32 [BLOCK]."""
    if STATE_BITS == 8:
        m_codes, m_exponents = _load_blocks(exp_avg_row, exp_avg_scale_row, start, columns, BLOCK, STATE_BLOCK, WHOLE)
        v_codes, v_exponents = _load_blocks(second_row, second_scale_row, start, columns, BLOCK, STATE_BLOCK, WHOLE)
        m = _decode_signed(m_codes, m_exponents, beta1, BLOCK, SIGNED_EXPONENT_MIN)
        v = _decode_unsigned(v_codes, v_exponents, BLOCK, UNSIGNED_EXPONENT_MIN)
    else:
        offsets = start + tl.arange(0, BLOCK)
        inside = None if WHOLE else offsets < columns
        m = tl.load(exp_avg_row + offsets, mask=inside) * beta1
        v = tl.load(second_row + offsets, mask=inside)
    return m, v


@triton.jit
def _store_moments(
    exp_avg_row, exp_avg_scale_row, second_row, second_scale_row, m, v, words, start, columns, STATE_BITS: tl.constexpr,
    STATE_BLOCK: tl.constexpr, SIGNED_EXPONENT_MIN: tl.constexpr, UNSIGNED_EXPONENT_MIN: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Moments [BLOCK], rounded with the lowest 20 bits of `words` where they have 8."""
    if STATE_BITS == 8:
        noise = tl.reshape((words & 0xFFFFF).to(tl.int32), (BLOCK // STATE_BLOCK, STATE_BLOCK))
        m_codes, m_exponents = _encode_signed(m, noise, SIGNED_EXPONENT_MIN)
        _store_blocks(exp_avg_row, exp_avg_scale_row, m_codes, m_exponents, start, columns, BLOCK, STATE_BLOCK, WHOLE)
        v_codes, v_exponents = _encode_unsigned(v, noise, UNSIGNED_EXPONENT_MIN)
        _store_blocks(second_row, second_scale_row, v_codes, v_exponents, start, columns, BLOCK, STATE_BLOCK, WHOLE)
    else:
        offsets = start + tl.arange(0, BLOCK)
        inside = None if WHOLE else offsets < columns
        tl.store(exp_avg_row + offsets, m, mask=inside)
        tl.store(second_row + offsets, v, mask=inside)


@triton.jit
def _load_gradient(gradient_row, start, columns, moves, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """fp32 [BLOCK]; zeros when nothing moves, whatever stands there."""
    if gradient_row.dtype.element_ty == tl.bfloat16:
        # Pairs, whose halves are the upper halves of two fp32.
        pairs_at = (gradient_row + start).to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, BLOCK // 2)
        inside = moves if WHOLE else moves & (tl.arange(0, BLOCK // 2) < (columns - start) // 2)
        pairs = tl.load(pairs_at, mask=inside, other=0)
        result = tl.interleave(
            (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
        )
    else:
        inside = moves if WHOLE else moves & (tl.arange(0, BLOCK) < columns - start)
        result = tl.load((gradient_row + start) + tl.arange(0, BLOCK), mask=inside, other=0.0)
    return result


@triton.jit
def _saturated(x):
    """int32 >> 20 to uint8, negative numbers to 0. A shift as the high half of a product runs beside the others of this kernel."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        mul.hi.s32 a, $1, 4096; mul.hi.s32 b, $2, 4096; mul.hi.s32 c, $3, 4096; mul.hi.s32 d, $4, 4096;
        cvt.pack.sat.u8.s32.b32 c, d, c, 0; cvt.pack.sat.u8.s32.b32 $0, b, a, c;
        }""",
        "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _square_root(x):
    """To 2^-22; a denormal counts as zero."""
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    """To an ulp: one instruction where a division takes six."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["key", "step"])
def _adamw_kernel(
    codes,
    gradient,
    exp_avg,
    exp_avg_scale,
    second,
    second_scale,
    first_element,
    matrix_id,
    row_scale,
    counts,
    clip,
    decay_factor,
    beta1,
    weight1,
    beta2,
    weight2,
    root_factor,
    epsilon,
    key,
    step,
    columns,
    packed_columns,
    segment,
    CLIPPED: tl.constexpr,
    GRADIENT_LIMIT: tl.constexpr,
    STATE_BITS: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    SIGNED_EXPONENT_MIN: tl.constexpr,
    UNSIGNED_EXPONENT_MIN: tl.constexpr,
    DECAYS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    STORAGE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row, first, last, first_counter, id_word = _place(first_element, matrix_id, columns, segment)
    moves = True
    if CLIPPED:
        factor = tl.load(clip)
        # What a gradient is multiplied with before it goes into the moments.
        weight1 *= factor
        weight2 *= factor * factor
        moves = factor > 0.0
    # The rate divides the denominator, so that it costs no operation a weight; where nothing moves it is infinite, as for a rate of zero.
    scale = tl.load(row_scale + row)
    root_factor = tl.where(moves, root_factor * scale, 0.0)
    epsilon = tl.where(moves, epsilon * scale, float("inf"))
    codes_row = codes + row * packed_columns
    gradient_row = gradient + row * columns
    exp_avg_row = exp_avg + row * columns
    second_row = second + row * columns
    exp_avg_scale_row = exp_avg_scale + row * (columns // STATE_BLOCK)
    second_scale_row = second_scale + row * (columns // STATE_BLOCK)
    flips, zeros, clamped = _no_counts(BLOCK)
    for start in range(first, last, BLOCK):
        tl.assume(start >= 0)  # divisions are shifts then
        old = _load_packed(codes_row, start, packed_columns, QMIN, STORAGE_BITS, BLOCK, WHOLE)
        g = _load_gradient(gradient_row, start, columns, moves, BLOCK, WHOLE)
        if not CLIPPED:
            g = tl.where(tl.abs(g) < GRADIENT_LIMIT, g, 0.0)
        m, v = _load_moments(
            exp_avg_row, exp_avg_scale_row, second_row, second_scale_row, start, columns, beta1,
            STATE_BITS, STATE_BLOCK, SIGNED_EXPONENT_MIN, UNSIGNED_EXPONENT_MIN, BLOCK, WHOLE,
        )  # fmt: skip
        words = _draw(first_counter + (start >> 2), id_word, key, step, BLOCK)
        m += weight1 * g
        v = beta2 * v + weight2 * g * g
        _store_moments(
            exp_avg_row, exp_avg_scale_row, second_row, second_scale_row, m, v, words, start, columns,
            STATE_BITS, STATE_BLOCK, SIGNED_EXPONENT_MIN, UNSIGNED_EXPONENT_MIN, BLOCK, WHOLE,
        )  # fmt: skip
        fields = _fields(old, QMIN, STORAGE_BITS)
        if DECAYS:
            fields = _decayed(fields, decay_factor, QMIN)
        wanted = fields - m * _reciprocal(_square_root(v) * root_factor + epsilon)
        new_flips, new_zeros, new_clamped = _land(
            codes_row, old, wanted, words, start, columns, packed_columns,
            STOCHASTIC, QMIN, QMAX, STORAGE_BITS, BLOCK, WHOLE,
        )  # fmt: skip
        flips += new_flips
        zeros += new_zeros
        clamped += new_clamped
    _store_counts(counts, flips, zeros, clamped)


def adamw_update_rows_triton(
    weight: LowBitMatrix,
    gradient: Tensor,
    moments: dict[str, Tensor],
    start: int,
    clip: Tensor | None,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    gradient_limit: float,
    key: RoundingKey,
) -> Tensor:
    """As `adamw_update_rows_reference` of optim/adamw.py, counts in parts; gradient and moments contiguous, on the device of the codes."""
    exp_avg, second = moments["exp_avg"], moments["exp_avg_sq"]
    state_bits = exp_avg.itemsize * 8
    # Unused with 32 bits.
    scales = moments.get("exp_avg_scale", exp_avg), moments.get("exp_avg_sq_scale", second)
    assert state_bits == 32 or weight.columns % STATE_BLOCK == 0, weight.columns
    assert all(tensor.is_contiguous() for tensor in (gradient, exp_avg, second, *scales))
    rows = gradient.shape[0]
    counts, walk = _walk(weight, rows, key)
    beta1, beta2 = betas
    # direction * learning_rate / scale = m / (sqrt(v) * root_factor * scale + epsilon * scale)
    rate = learning_rate / (1.0 - beta1**key.step)
    root_factor, epsilon = (
        (1.0 / (1.0 - beta2**key.step) ** 0.5 / rate, epsilon / rate) if rate > 0 else (0.0, float("inf"))
    )
    launch(
        _adamw_kernel,
        tuple(counts.shape[:2]),
        weight.packed(start, start + rows),
        gradient,
        exp_avg,
        scales[0],
        second,
        scales[1],
        *_row_facts(weight, start, start + rows),
        counts,
        clip,
        1.0 - learning_rate * weight_decay,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        root_factor,
        epsilon,
        *walk,
        CLIPPED=clip is not None,
        GRADIENT_LIMIT=gradient_limit,
        STATE_BITS=state_bits,
        STATE_BLOCK=STATE_BLOCK,
        SIGNED_EXPONENT_MIN=SIGNED_EXPONENT_MIN,
        UNSIGNED_EXPONENT_MIN=UNSIGNED_EXPONENT_MIN,
        DECAYS=weight_decay > 0,
        **_constants(weight, key),
    )
    return counts
