# Triton may be absent. Its types know no index into a jit function, and no result of one.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportGeneralTypeIssues=false
"""The rounding update in Triton: two kernels that rewrite packed codes in place.

    function                   reads                   definition
    update_rows_triton         a direction             lowbit/update.py, update_rows_reference
    adamw_update_rows_triton   a gradient, moments     optim/adamw.py, adamw_update_rows_reference; writes moments too

Each kernel draws the same 32-bit words as its definition. There are four differences:

    - fp32 arithmetic is contracted to fused multiply-adds;
    - the wanted weight is counted from the lowest code instead of from zero (a *field* is a code less the lowest code);
    - roots and quotients are approximate;
    - a small u has more digits (`device/rounding.py`, `round_fields`).

Each difference changes the outcome of about one draw in 2^20, and of no draw where the wanted weight is exact in fp32.

Bytes that move per ternary weight:

    codes                1/4 read, 1/4 written
    fp32 direction       4 read
    bf16 gradient        2 read                                 with AdamW
    8-bit moments        2.0625 read, 2.0625 written            with AdamW; 6.6 bytes in all; 4.6 with a factored
                                                                second moment, of which nothing is stored here
    32-bit moments       8 read, 8 written                      with AdamW

With 8-bit moments an H200 spends more time on instructions than on these bytes. So instructions count: 48 per weight
for ternary codes, 10 of them for Philox, and 58 with 8-bit latents. A step whose figures are shown counts flips, zeros
and clamped weights, with 52 and 68. One Philox call serves both the codes and the moments of four weights.
docs/benchmarks/kernels.md lists the cost of each part.

One program works on one row, or on a part of a row where there are few rows. Matrix, scale and first element index are
then scalars, and counts need no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqt_dist.config import STATE_BLOCK
from dqt_dist.kernels.device.block_float import (
    decode_signed,
    decode_unsigned,
    encode_signed,
    encode_unsigned,
    load_blocks,
    store_blocks,
)
from dqt_dist.kernels.device.instructions import clamp_to_span, reciprocal, square_root
from dqt_dist.kernels.device.packing import (
    count_nonzero_fields,
    group_of_zero_codes,
    load_packed,
    pack_fields,
    store_packed,
    unpack_fields,
)
from dqt_dist.kernels.device.philox import random_words
from dqt_dist.kernels.device.rounding import ROUNDER, round_fields
from dqt_dist.kernels.launch import launch
from dqt_dist.kernels.low_bit_update import GRADIENT_LIMIT, AdamW
from dqt_dist.lowbit.block_float import SIGNED_EXPONENT_MIN, UNSIGNED_EXPONENT_MIN
from dqt_dist.lowbit.coordinates import Purpose, row_words
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import COUNTS, LATENT_COUNTS, RoundingKey

# Columns that a program handles at once, a power of two, and its warps. A thread has 8 columns, so a bf16 gradient is a
# 16-byte load. One warp needs no barriers. 256 divides more row lengths than larger blocks do.
BLOCK, NUM_WARPS = 256, 1
# A row is divided over programs until there are MIN_PROGRAMS, or until a program has only MIN_BLOCKS blocks.
# MIN_PROGRAMS is four for each of the 32 places on 132 multiprocessors.
MIN_PROGRAMS, MIN_BLOCKS = 1 << 14, 4


# ---- device functions of both kernels ----


@triton.jit
def _locate_program(first_element, matrix_id, columns, columns_per_program):
    """What this program works on.

    Returns its row, its first column, the column after its last, the counter of the row's first four elements, and the
    id of the row's matrix.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * columns_per_program
    counter = (tl.load(first_element + row) >> 2).to(tl.int32)
    return row, first, tl.minimum(columns, first + columns_per_program), counter, tl.load(matrix_id + row).to(tl.uint32)


@triton.jit
def _decayed(fields, decay_factor, QMIN: tl.constexpr):
    """Fields of codes times a factor: (u + QMIN) * factor - QMIN."""
    return fields * decay_factor + (QMIN * decay_factor - QMIN)


@triton.jit
def _load_stored(
    codes_row, latents_row, start, packed_columns, packed_latents,
    QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr, LATENT_QMIN: tl.constexpr, LATENT_STORAGE_BITS: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Packed codes and packed latents of a block, int32. Without latents the codes twice."""
    old = load_packed(codes_row, start, packed_columns, QMIN, STORAGE_BITS, BLOCK, WHOLE)
    old_latents = old
    if LATENT_STORAGE_BITS > 0:
        old_latents = load_packed(latents_row, start, packed_latents, LATENT_QMIN, LATENT_STORAGE_BITS, BLOCK, WHOLE)
    return old, old_latents


@triton.jit
def _codes_of_latents(fields, ratio, LATENT_QMIN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Fields of the codes of latents, int32 [BLOCK] with a multiple of 2^16 added. Definition: lowbit/latent.py.

    `fields` are the fields of latents as `round_fields` leaves them, `ratio` is r. |L| r is exact.
    """
    latents = fields.to(tl.float32, bitcast=True) - (ROUNDER - LATENT_QMIN)
    magnitude = tl.abs(latents) * ratio
    if QMIN == -1:
        codes = tl.where(magnitude < 0.5, 0.0, tl.where(latents < 0, -1.0, 1.0))
    else:
        magnitude = tl.floor(magnitude + 0.5)
        codes = tl.minimum(tl.maximum(tl.where(latents < 0, -magnitude, magnitude), QMIN), QMAX)
    return (codes + (ROUNDER - QMIN)).to(tl.int32, bitcast=True), latents


@triton.jit
def _round_and_store(
    codes_row, latents_row, old, old_latents, wanted, words, ratio, start, columns, packed_columns, packed_latents,
    STOCHASTIC: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, STORAGE_BITS: tl.constexpr,
    LATENT_QMIN: tl.constexpr, LATENT_QMAX: tl.constexpr, LATENT_STORAGE_BITS: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Rounds wanted fields, fp32 [BLOCK] and finite, and stores their groups over `old`.

    With latents (LATENT_STORAGE_BITS is not 0) these are fields of latents, whose bytes are stored over `old_latents`,
    and the codes of the new latents are stored over `old`. Returns what COUNTS and LATENT_COUNTS of lowbit/update.py
    name, for every 8 columns: int32 [BLOCK / 8], clamped weights and sums of |L| in fp32. Unless COUNTED, all but the
    sums of |L| are 0.
    """
    HAS_LATENTS: tl.constexpr = LATENT_STORAGE_BITS > 0
    STORED_QMIN: tl.constexpr = LATENT_QMIN if HAS_LATENTS else QMIN
    STORED_QMAX: tl.constexpr = LATENT_QMAX if HAS_LATENTS else QMAX
    inside_grid = clamp_to_span(wanted, STORED_QMAX - STORED_QMIN)
    new = round_fields(inside_grid, words, STORED_QMIN, STOCHASTIC)
    flips, clamped = _no_counts(BLOCK)
    zeros, latent_flips, abs_sum = flips, flips, clamped
    if HAS_LATENTS:
        new_latents = new
        new, latents = _codes_of_latents(new, ratio, LATENT_QMIN, QMIN, QMAX)
        magnitudes = tl.abs(latents)
        if not WHOLE:
            inside = start + tl.arange(0, BLOCK) < columns
            magnitudes = tl.where(inside, magnitudes, 0.0)
            # Columns past the end keep a zero field, as packing leaves it.
            new_latents = tl.where(inside, new_latents, 0)
        new_latents = pack_fields(new_latents, LATENT_QMIN, LATENT_STORAGE_BITS, BLOCK)
        store_packed(latents_row, new_latents, start, packed_latents, LATENT_STORAGE_BITS, BLOCK, WHOLE)
        if COUNTED:
            latent_flips = count_nonzero_fields(old_latents ^ new_latents, LATENT_STORAGE_BITS, BLOCK)
        abs_sum = tl.sum(tl.reshape(magnitudes, (BLOCK // 8, 8)), axis=1)
    if not WHOLE:
        new = tl.where(start + tl.arange(0, BLOCK) < columns, new, 0)
    new = pack_fields(new, QMIN, STORAGE_BITS, BLOCK)
    store_packed(codes_row, new, start, packed_columns, STORAGE_BITS, BLOCK, WHOLE)
    if COUNTED:
        zeros = 8 - count_nonzero_fields(new ^ group_of_zero_codes(QMIN, STORAGE_BITS), STORAGE_BITS, BLOCK)
        flips = count_nonzero_fields(old ^ new, STORAGE_BITS, BLOCK)
        outside_grid = tl.where(inside_grid != wanted, 1.0, 0.0)
        if not WHOLE:
            outside_grid = tl.where(start + tl.arange(0, BLOCK) < columns, outside_grid, 0.0)
        clamped = tl.sum(tl.reshape(outside_grid, (BLOCK // 8, 8)), axis=1)
    return flips, zeros, clamped, latent_flips, abs_sum


@triton.jit
def _no_counts(BLOCK: tl.constexpr):
    """Zero counts of every 8 columns, int32 and fp32."""
    none = tl.zeros((BLOCK // 8,), tl.int32)
    return none, none.to(tl.float32)


@triton.jit
def _store_counts(counts, flips, zeros, clamped, latent_flips, abs_sum, HAS_LATENTS: tl.constexpr):
    """Stores the counts of this program; fp32 holds them exactly."""
    num_counts = 5 if HAS_LATENTS else 3
    own = counts + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * num_counts
    tl.store(own, tl.sum(flips))
    tl.store(own + 1, tl.sum(zeros))
    tl.store(own + 2, tl.sum(clamped).to(tl.int32))
    if HAS_LATENTS:
        tl.store(own + 3, tl.sum(latent_flips))
        tl.store(own + 4, tl.sum(abs_sum).to(tl.int32))


# ---- the update by a direction ----


# `key` and `step` are not specialised: a step of 1 or a multiple of 16 would otherwise compile the kernel anew.
@triton.jit(do_not_specialize=["key", "step"])
def _update_kernel(
    codes,
    latents,
    direction,
    first_element,
    matrix_id,
    stored_scale,
    codes_per_latent,
    counts,
    learning_rate,
    decay_factor,
    key,
    step,
    columns,
    packed_columns,
    packed_latents,
    columns_per_program,
    STOCHASTIC: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    STORAGE_BITS: tl.constexpr,
    LATENT_QMIN: tl.constexpr,
    LATENT_QMAX: tl.constexpr,
    LATENT_STORAGE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """One rounding update of `rows` rows; program (i, j) has the j-th part of row i. Source: arXiv 2412.04787.

    For each block of BLOCK columns, with s the scale of the row. With latents, read latents for codes in steps 1 to 3,
    and their grid and scale:

        1. u  = C - QMIN                                          fields of the packed codes C
        2. t  = u * d + (QMIN * d - QMIN) - direction * (lr / s)  wanted field, d = decay_factor; t = u if not finite
        3. u' = round(clamp(t, 0, QMAX - QMIN))                   to nearest, or stochastic with the words of
                                                                  Philox(key, element, step, matrix)
        4. with latents: store u' over the latents; u' = the fields of their codes
        5. pack u', store it over C, count flips, zeros and clamped weights

    argument              shape                    dtype          meaning
    codes                 [rows, packed_columns]   uint8 or int8  packed codes; rewritten
    latents               [rows, packed_latents]   uint8 or int8  packed latents; rewritten; not read where there are
                                                                  none
    direction             [rows, columns]          fp32           weight units per unit of learning rate
    first_element         [rows]                   int64          index of the row's first element in its matrix,
                                                                  a multiple of 4
    matrix_id             [rows]                   int64          32-bit id of the row's logical matrix
    stored_scale          [rows]                   fp32           weight units per code or, where there are latents, per
                                                                  latent
    codes_per_latent      [rows]                   fp32           r of lowbit/latent.py; not used without latents
    counts                [rows, programs, 3 or 5] int32          COUNTS or LATENT_COUNTS of each program; written
    learning_rate         scalar                   fp32
    decay_factor          scalar                   fp32           1 - learning_rate * weight_decay
    key                   scalar                   int64          purpose << 32 | seed
    step                  scalar                   int32          optimizer step, counted from 1
    columns               scalar                   int32          columns of a row, a multiple of 4
    packed_columns        scalar                   int32          bytes of a row of codes
    packed_latents        scalar                   int32          bytes of a row of latents
    columns_per_program   scalar                   int32          a multiple of BLOCK
    STOCHASTIC            constexpr                bool           rounding mode
    QMIN, QMAX            constexpr                int            ends of the grid
    STORAGE_BITS          constexpr                int            bits of a stored code: 2, 4, 6 or 8
    LATENT_...            constexpr                int            the same of latents; LATENT_STORAGE_BITS is 0 where
                                                                  there are none
    BLOCK                 constexpr                int            columns handled at once
    WHOLE                 constexpr                bool           `columns` is a multiple of BLOCK
    COUNTED               constexpr                bool           flips, zeros and clamped weights are counted
    """
    row, first, last, first_counter, id_word = _locate_program(first_element, matrix_id, columns, columns_per_program)
    stored_per_direction = learning_rate / tl.load(stored_scale + row)
    codes_row = codes + row * packed_columns
    latents_row = latents + row * packed_latents
    ratio = tl.load(codes_per_latent + row)
    direction_row = direction + row * columns
    STORED_QMIN: tl.constexpr = LATENT_QMIN if LATENT_STORAGE_BITS > 0 else QMIN
    flips, clamped = _no_counts(BLOCK)
    zeros, latent_flips, abs_sum = flips, flips, clamped
    for start in range(first, last, BLOCK):
        tl.assume(start >= 0)  # so that divisions are shifts
        offsets = start + tl.arange(0, BLOCK)
        inside = None if WHOLE else offsets < columns
        old, old_latents = _load_stored(
            codes_row, latents_row, start, packed_columns, packed_latents,
            QMIN, STORAGE_BITS, LATENT_QMIN, LATENT_STORAGE_BITS, BLOCK, WHOLE,
        )  # fmt: skip
        fields = unpack_fields(old_latents, STORED_QMIN, LATENT_STORAGE_BITS or STORAGE_BITS)
        move = tl.load(direction_row + offsets, mask=inside) * stored_per_direction
        wanted = _decayed(fields, decay_factor, STORED_QMIN) - move
        wanted = tl.where(tl.abs(wanted) < float("inf"), wanted, fields)
        words = random_words(first_counter + (start >> 2), id_word, key, step, BLOCK)
        new_flips, new_zeros, new_clamped, new_latent_flips, new_abs_sum = _round_and_store(
            codes_row, latents_row, old, old_latents, wanted, words, ratio, start, columns, packed_columns,
            packed_latents, STOCHASTIC, QMIN, QMAX, STORAGE_BITS, LATENT_QMIN, LATENT_QMAX, LATENT_STORAGE_BITS,
            BLOCK, WHOLE, COUNTED,
        )  # fmt: skip
        flips += new_flips
        zeros += new_zeros
        clamped += new_clamped
        latent_flips += new_latent_flips
        abs_sum += new_abs_sum
    _store_counts(counts, flips, zeros, clamped, latent_flips, abs_sum, LATENT_STORAGE_BITS > 0)


def update_rows_triton(
    weight: LowBitMatrix,
    direction: Tensor,
    start: int,
    learning_rate: float,
    weight_decay: float,
    key: RoundingKey,
    latents: Tensor | None = None,
    counted: bool = True,
) -> Tensor:
    """As `update_rows` of low_bit_update.py. `direction` is contiguous, on the device of the codes."""
    assert direction.dtype == torch.float32 and direction.is_contiguous()
    assert latents is None or latents.is_contiguous()
    rows = direction.shape[0]
    division = _divide(weight, rows)
    codes = weight.packed(start, start + rows)
    launch(
        _update_kernel,
        division.grid,
        codes,
        codes if latents is None else latents,
        direction,
        *_row_arguments(weight, start, start + rows),
        division.counts,
        learning_rate,
        1.0 - learning_rate * weight_decay,
        *_walk_arguments(weight, division, key),
        **_constants(weight, key, counted),
    )
    return division.counts


# ---- AdamW in the same pass ----


@triton.jit
def _load_moments(
    exp_avg_row, exp_avg_exponents_row, exp_avg_sq_row, exp_avg_sq_exponents_row, row_factor, start, columns, beta1,
    FACTORED: tl.constexpr, STATE_BITS: tl.constexpr, STATE_BLOCK: tl.constexpr, SIGNED_EXPONENT_MIN: tl.constexpr,
    UNSIGNED_EXPONENT_MIN: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """beta1 times the first moment, and the second moment: fp32 [BLOCK].

    FACTORED: exp_avg_sq_row has the column means of the row's matrix in fp32, whatever STATE_BITS. The second moment is
    `row_factor` times these.
    """
    offsets = start + tl.arange(0, BLOCK)
    inside = None if WHOLE else offsets < columns
    if STATE_BITS == 8:
        m_codes, m_exponents = load_blocks(
            exp_avg_row, exp_avg_exponents_row, start, columns, BLOCK, STATE_BLOCK, WHOLE
        )
        m = decode_signed(m_codes, m_exponents, beta1, BLOCK, SIGNED_EXPONENT_MIN)
    else:
        m = tl.load(exp_avg_row + offsets, mask=inside) * beta1
    if FACTORED:
        v = tl.load(exp_avg_sq_row + offsets, mask=inside) * row_factor
    elif STATE_BITS == 8:
        v_codes, v_exponents = load_blocks(
            exp_avg_sq_row, exp_avg_sq_exponents_row, start, columns, BLOCK, STATE_BLOCK, WHOLE
        )
        v = decode_unsigned(v_codes, v_exponents, BLOCK, UNSIGNED_EXPONENT_MIN)
    else:
        v = tl.load(exp_avg_sq_row + offsets, mask=inside)
    return m, v


@triton.jit
def _store_moments(
    exp_avg_row, exp_avg_exponents_row, exp_avg_sq_row, exp_avg_sq_exponents_row, m, v, words, start, columns,
    FACTORED: tl.constexpr, STATE_BITS: tl.constexpr, STATE_BLOCK: tl.constexpr, SIGNED_EXPONENT_MIN: tl.constexpr,
    UNSIGNED_EXPONENT_MIN: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Stores moments m and v, fp32 [BLOCK]; only m when FACTORED. The lowest 20 bits of `words` round moments of 8
    bits."""
    if STATE_BITS == 8:
        noise = tl.reshape((words & 0xFFFFF).to(tl.int32), (BLOCK // STATE_BLOCK, STATE_BLOCK))
        m_codes, m_exponents = encode_signed(m, noise, SIGNED_EXPONENT_MIN)
        store_blocks(
            exp_avg_row, exp_avg_exponents_row, m_codes, m_exponents, start, columns, BLOCK, STATE_BLOCK, WHOLE
        )
        if not FACTORED:
            v_codes, v_exponents = encode_unsigned(v, noise, UNSIGNED_EXPONENT_MIN)
            store_blocks(
                exp_avg_sq_row, exp_avg_sq_exponents_row, v_codes, v_exponents, start, columns, BLOCK, STATE_BLOCK,
                WHOLE,
            )  # fmt: skip
    else:
        offsets = start + tl.arange(0, BLOCK)
        inside = None if WHOLE else offsets < columns
        tl.store(exp_avg_row + offsets, m, mask=inside)
        if not FACTORED:
            tl.store(exp_avg_sq_row + offsets, v, mask=inside)


@triton.jit
def _load_gradient(gradient_row, start, columns, is_taken, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Gradient of a block, fp32 [BLOCK]; zeros, without a read, where the step is not taken."""
    if gradient_row.dtype.element_ty == tl.bfloat16:
        # Two bf16 at once, as an int32: bf16 is the upper half of fp32.
        pair_pointers = (gradient_row + start).to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, BLOCK // 2)
        inside = is_taken if WHOLE else is_taken & (tl.arange(0, BLOCK // 2) < (columns - start) // 2)
        pairs = tl.load(pair_pointers, mask=inside, other=0)
        result = tl.interleave(
            (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
        )
    else:
        inside = is_taken if WHOLE else is_taken & (tl.arange(0, BLOCK) < columns - start)
        result = tl.load((gradient_row + start) + tl.arange(0, BLOCK), mask=inside, other=0.0)
    return result


@triton.jit(do_not_specialize=["key", "step"])
def _adamw_kernel(
    codes,
    latents,
    gradient,
    exp_avg,
    exp_avg_exponents,
    exp_avg_sq,
    exp_avg_sq_exponents,
    row_factor,
    matrix_index,
    first_element,
    matrix_id,
    stored_scale,
    codes_per_latent,
    counts,
    clip,
    decay_factor,
    beta1,
    gradient_weight,
    beta2,
    square_weight,
    root_factor,
    epsilon,
    key,
    step,
    columns,
    packed_columns,
    packed_latents,
    columns_per_program,
    CLIPPED: tl.constexpr,
    FACTORED: tl.constexpr,
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
    LATENT_QMIN: tl.constexpr,
    LATENT_QMAX: tl.constexpr,
    LATENT_STORAGE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """One AdamW step and rounding update of `rows` rows; program (i, j) has the j-th part of row i.

    Sources: arXiv 1711.05101 (AdamW), arXiv 2412.04787 (the update). With Adam's step number n and the row's scale s:

        m = beta1 m + (1 - beta1) c g          v = beta2 v + (1 - beta2) (c g)^2          c = clip
        t = C (1 - lr wd) - (lr / s) * (m / (1 - beta1^n)) / (sqrt(v / (1 - beta2^n)) + eps)

    The kernel divides numerator and denominator of the last term by rate / s, with rate = lr / (1 - beta1^n). Then
    neither the rate nor the scale costs an instruction per weight:

        root_factor R = s / (rate * sqrt(1 - beta2^n))
        epsilon     E = s * eps / rate
        t = C (1 - lr wd) - m / (R sqrt(v) + E)

    With latents L, read L for C and the latent scale for s above. Steps, for each block of BLOCK columns:

        1. read the packed codes and latents, the gradient g and the moments m, v
        2. without a clip factor: g = 0 where |g| >= GRADIENT_LIMIT or g is not finite
        3. draw the words: Philox(key, element, step, matrix)
        4. m = beta1 m + gradient_weight g          v = beta2 v + square_weight g^2
        5. store m and v; 8-bit moments are rounded stochastically with the lowest 20 bits of the words
        6. u = C - QMIN, decayed          t = u - m / (R sqrt(v) + E), from the moments of step 4, not the stored ones
        7. u' = round(clamp(t, 0, QMAX - QMIN)), stochastic with the words, or to nearest
        8. with latents: store u' over L; u' = the fields of the codes of the new latents
        9. pack u', store it over C, count flips, zeros and clamped weights

    A clip factor of 0 says that the step is not to be taken. Then the kernel reads no gradients and sets R = 0 and
    E = infinity, and decays no code: moments decay, and no code changes. A learning rate of 0 sets R and E in the same
    way.

    argument               shape                        dtype          meaning
    codes                  [rows, packed_columns]       uint8 or int8  packed codes; rewritten
    latents                [rows, packed_latents]       uint8 or int8  packed latents; rewritten, where there are any
    gradient               [rows, columns]              bf16 or fp32   g
    exp_avg                [rows, columns]              uint8 or fp32  m: signed block floats, or fp32; rewritten
    exp_avg_exponents      [rows, columns/STATE_BLOCK]  uint8          exponents of m; unused where STATE_BITS is 32
    exp_avg_sq             [rows, columns]              uint8 or fp32  v: unsigned block floats, or fp32; rewritten
    exp_avg_sq_exponents   [rows, columns/STATE_BLOCK]  uint8          exponents of v; unused where STATE_BITS is 32
    row_factor             [rows]                       fp32           with FACTORED: v = row_factor * column mean;
                                                                       exp_avg_sq then has the column means of this
                                                                       step, fp32 [matrices, columns], and is only read
    matrix_index           [rows]                       integer        with FACTORED: which matrix the row belongs to
    first_element          [rows]                       int64          index of the row's first element in its matrix
    matrix_id              [rows]                       int64          32-bit id of the row's logical matrix
    stored_scale           [rows]                       fp32           s, weight units per code, or per latent
    codes_per_latent       [rows]                       fp32           r of lowbit/latent.py; not used without latents
    counts                 [rows, programs, 3 or 5]     int32          COUNTS or LATENT_COUNTS; written
    clip                   [] or None                   fp32           c
    decay_factor           scalar                       fp32           1 - lr wd
    beta1                  scalar                       fp32
    gradient_weight        scalar                       fp32           1 - beta1; times c in the kernel
    beta2                  scalar                       fp32
    square_weight          scalar                       fp32           1 - beta2; times c^2 in the kernel
    root_factor            scalar                       fp32           R / s = 1 / (rate * sqrt(1 - beta2^n))
    epsilon                scalar                       fp32           E / s = eps / rate
    key                    scalar                       int64          purpose << 32 | seed
    step                   scalar                       int32          n, counted from 1
    columns                scalar                       int32          columns of a row, a multiple of 4
    packed_columns         scalar                       int32          bytes of a row of codes
    packed_latents         scalar                       int32          bytes of a row of latents
    columns_per_program    scalar                       int32          a multiple of BLOCK
    CLIPPED                constexpr                    bool           `clip` is given
    FACTORED               constexpr                    bool           the second moment is factored: no v in steps 4
                                                                       and 5
    GRADIENT_LIMIT         constexpr                    float          of step 2
    STATE_BITS             constexpr                    int            bits of a moment: 8 or 32
    STATE_BLOCK            constexpr                    int            columns that share an exponent
    (UN)SIGNED_EXPONENT_MIN constexpr                   int            smallest exponents, lowbit/block_float.py
    DECAYS                 constexpr                    bool           decay_factor is not 1
    STOCHASTIC             constexpr                    bool           rounding mode of the codes
    QMIN, QMAX             constexpr                    int            ends of the grid
    STORAGE_BITS           constexpr                    int            bits of a stored code: 2, 4, 6 or 8
    LATENT_...             constexpr                    int            the same of latents; LATENT_STORAGE_BITS is 0
                                                                       where there are none
    BLOCK                  constexpr                    int            columns handled at once
    WHOLE                  constexpr                    bool           `columns` is a multiple of BLOCK
    COUNTED                constexpr                    bool           flips, zeros and clamped weights are counted
    """
    row, first, last, first_counter, id_word = _locate_program(first_element, matrix_id, columns, columns_per_program)
    is_taken = True
    if CLIPPED:
        factor = tl.load(clip)
        gradient_weight *= factor
        square_weight *= factor * factor
        is_taken = factor > 0.0
    scale = tl.load(stored_scale + row)
    root_factor = tl.where(is_taken, root_factor * scale, 0.0)
    epsilon = tl.where(is_taken, epsilon * scale, float("inf"))
    decay_factor = tl.where(is_taken, decay_factor, 1.0)
    codes_row = codes + row * packed_columns
    latents_row = latents + row * packed_latents
    ratio = tl.load(codes_per_latent + row)
    gradient_row = gradient + row * columns
    exp_avg_row = exp_avg + row * columns
    exp_avg_sq_row = exp_avg_sq + row * columns
    factor_of_row = 1.0
    if FACTORED:
        exp_avg_sq_row = exp_avg_sq + tl.load(matrix_index + row).to(tl.int64) * columns
        factor_of_row = tl.load(row_factor + row)
    exp_avg_exponents_row = exp_avg_exponents + row * (columns // STATE_BLOCK)
    exp_avg_sq_exponents_row = exp_avg_sq_exponents + row * (columns // STATE_BLOCK)
    STORED_QMIN: tl.constexpr = LATENT_QMIN if LATENT_STORAGE_BITS > 0 else QMIN
    flips, clamped = _no_counts(BLOCK)
    zeros, latent_flips, abs_sum = flips, flips, clamped
    for start in range(first, last, BLOCK):
        tl.assume(start >= 0)  # so that divisions are shifts
        old, old_latents = _load_stored(
            codes_row, latents_row, start, packed_columns, packed_latents,
            QMIN, STORAGE_BITS, LATENT_QMIN, LATENT_STORAGE_BITS, BLOCK, WHOLE,
        )  # fmt: skip
        g = _load_gradient(gradient_row, start, columns, is_taken, BLOCK, WHOLE)
        if not CLIPPED:
            g = tl.where(tl.abs(g) < GRADIENT_LIMIT, g, 0.0)
        m, v = _load_moments(
            exp_avg_row, exp_avg_exponents_row, exp_avg_sq_row, exp_avg_sq_exponents_row, factor_of_row, start,
            columns, beta1, FACTORED, STATE_BITS, STATE_BLOCK, SIGNED_EXPONENT_MIN, UNSIGNED_EXPONENT_MIN, BLOCK,
            WHOLE,
        )  # fmt: skip
        words = random_words(first_counter + (start >> 2), id_word, key, step, BLOCK)
        m += gradient_weight * g
        if not FACTORED:
            v = beta2 * v + square_weight * g * g
        _store_moments(
            exp_avg_row, exp_avg_exponents_row, exp_avg_sq_row, exp_avg_sq_exponents_row, m, v, words, start, columns,
            FACTORED, STATE_BITS, STATE_BLOCK, SIGNED_EXPONENT_MIN, UNSIGNED_EXPONENT_MIN, BLOCK, WHOLE,
        )  # fmt: skip
        fields = unpack_fields(old_latents, STORED_QMIN, LATENT_STORAGE_BITS or STORAGE_BITS)
        if DECAYS:
            fields = _decayed(fields, decay_factor, STORED_QMIN)
        wanted = fields - m * reciprocal(square_root(v) * root_factor + epsilon)
        new_flips, new_zeros, new_clamped, new_latent_flips, new_abs_sum = _round_and_store(
            codes_row, latents_row, old, old_latents, wanted, words, ratio, start, columns, packed_columns,
            packed_latents, STOCHASTIC, QMIN, QMAX, STORAGE_BITS, LATENT_QMIN, LATENT_QMAX, LATENT_STORAGE_BITS,
            BLOCK, WHOLE, COUNTED,
        )  # fmt: skip
        flips += new_flips
        zeros += new_zeros
        clamped += new_clamped
        latent_flips += new_latent_flips
        abs_sum += new_abs_sum
    _store_counts(counts, flips, zeros, clamped, latent_flips, abs_sum, LATENT_STORAGE_BITS > 0)


def adamw_update_rows_triton(
    weight: LowBitMatrix,
    gradient: Tensor,
    moments: dict[str, Tensor],
    start: int,
    clip: Tensor | None,
    learning_rate: float,
    adamw: AdamW,
    key: RoundingKey,
    counted: bool = True,
) -> Tensor:
    """As `adamw_update_rows` of optim/adamw.py.

    Gradient and moments are contiguous, on the device of the codes.
    """
    factored = "row_factor" in moments
    exp_avg, exp_avg_sq = moments["exp_avg"], moments["column_mean" if factored else "exp_avg_sq"]
    state_bits = exp_avg.itemsize * 8
    # The kernel does not read exponents with moments of 32 bits.
    exponents = moments.get("exp_avg_scale", exp_avg), moments.get("exp_avg_sq_scale", exp_avg_sq)
    assert state_bits == 32 or weight.columns % STATE_BLOCK == 0, weight.columns
    assert all(tensor.is_contiguous() for tensor in (gradient, exp_avg, exp_avg_sq, *exponents))
    rows = gradient.shape[0]
    division = _divide(weight, rows)
    beta1, beta2 = adamw.beta1, adamw.beta2
    rate = learning_rate / (1.0 - beta1**key.step)
    root_factor, epsilon = (
        (1.0 / (1.0 - beta2**key.step) ** 0.5 / rate, adamw.epsilon / rate) if rate > 0 else (0.0, float("inf"))
    )
    codes = weight.packed(start, start + rows)
    launch(
        _adamw_kernel,
        division.grid,
        codes,
        moments.get("latent", codes),
        gradient,
        exp_avg,
        exponents[0],
        exp_avg_sq,
        exponents[1],
        moments.get("row_factor", weight.row_matrix),
        weight.row_matrix[start : start + rows],
        *_row_arguments(weight, start, start + rows),
        division.counts,
        clip,
        1.0 - learning_rate * adamw.weight_decay,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        root_factor,
        epsilon,
        *_walk_arguments(weight, division, key),
        CLIPPED=clip is not None,
        FACTORED=factored,
        GRADIENT_LIMIT=GRADIENT_LIMIT,
        STATE_BITS=state_bits,
        STATE_BLOCK=STATE_BLOCK,
        SIGNED_EXPONENT_MIN=SIGNED_EXPONENT_MIN,
        UNSIGNED_EXPONENT_MIN=UNSIGNED_EXPONENT_MIN,
        DECAYS=adamw.weight_decay > 0,
        **_constants(weight, key, counted),
    )
    return division.counts


# ---- arguments of both kernels; the fields of a named tuple are in the order of the kernels' parameters ----


class _Division(NamedTuple):
    """How rows are divided over programs."""

    counts: Tensor
    """int32 [rows, programs per row, counts]: where each program stores its counts."""
    columns_per_program: int

    @property
    def grid(self) -> tuple[int, ...]:
        """Triton's launch grid: (rows, programs per row)."""
        return tuple(self.counts.shape[:2])


def _divide(weight: LowBitMatrix, rows: int) -> _Division:
    """The division of `rows` rows of `weight`."""
    num_blocks = triton.cdiv(weight.columns, BLOCK)
    blocks_per_program = max(MIN_BLOCKS, triton.cdiv(num_blocks, triton.cdiv(MIN_PROGRAMS, rows)))
    num_counts = len(COUNTS if weight.latent_grid is None else LATENT_COUNTS)
    shape = (rows, int(triton.cdiv(num_blocks, blocks_per_program)), num_counts)
    counts = torch.empty(shape, dtype=torch.int32, device=weight.codes.device)
    return _Division(counts, blocks_per_program * BLOCK)


class _RowArguments(NamedTuple):
    """What the kernels read once per row, each [rows]."""

    first_element: Tensor
    matrix_id: Tensor
    stored_scale: Tensor
    codes_per_latent: Tensor


def _row_arguments(weight: LowBitMatrix, start: int, stop: int) -> _RowArguments:
    """The arguments of rows [start, stop)."""
    assert weight.layout is not None
    first_element, matrix_id = row_words(weight.layout, weight.codes.device)
    rows = slice(start, stop)
    scale = ratio = weight.row_scale()[rows]
    if weight.latent_grid is not None:
        scale, ratio = weight.row_latent_scale()[rows], weight.row_codes_per_latent()[rows]
    return _RowArguments(first_element[rows], matrix_id[rows], scale, ratio)


class _WalkArguments(NamedTuple):
    """Which draws the kernels take, and how far a program walks along its row."""

    key: int
    step: int
    columns: int
    packed_columns: int
    packed_latents: int
    columns_per_program: int


def _walk_arguments(weight: LowBitMatrix, division: _Division, key: RoundingKey) -> _WalkArguments:
    key_words = int(Purpose.ROUND) << 32 | key.seed
    packed_latents = 0 if weight.latent_grid is None else weight.latent_grid.packed_columns(weight.columns)
    return _WalkArguments(
        key_words, key.step, weight.columns, weight.codes.shape[1], packed_latents, division.columns_per_program
    )


def _constants(weight: LowBitMatrix, key: RoundingKey, counted: bool) -> dict[str, int | bool]:
    """Constexpr parameters that both kernels have, and launch options."""
    grid, latent_grid = weight.grid, weight.latent_grid
    return {
        "STOCHASTIC": key.mode == "stochastic",
        "QMIN": grid.qmin,
        "QMAX": grid.qmax,
        "STORAGE_BITS": grid.storage_bits,
        "LATENT_QMIN": 0 if latent_grid is None else latent_grid.qmin,
        "LATENT_QMAX": 0 if latent_grid is None else latent_grid.qmax,
        "LATENT_STORAGE_BITS": 0 if latent_grid is None else latent_grid.storage_bits,
        "BLOCK": BLOCK,
        "WHOLE": weight.columns % BLOCK == 0,
        "COUNTED": counted,
        "num_warps": NUM_WARPS,
    }
