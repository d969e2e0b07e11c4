# pyright: reportMissingImports=false, reportIndexIssue=false
"""The rounding update in Triton, from a direction or with AdamW in the same pass; packed codes are rewritten in place.

    update_rows_triton         direction in                             definition: lowbit/update.py, update_rows_reference
    adamw_update_rows_triton   gradient and moments in, moments out     definition: optim/adamw.py, adamw_update_rows_reference

Both draw the same 32-bit words as their definitions and differ from them only where fp32 arithmetic is contracted to fused
multiply-adds, or where a root or quotient is approximate.

Bytes a ternary weight: 1/4 of codes read and written; a direction of 4 read; or a gradient of 2 (bf16) read and moments of 2.0625
(16 of fp32: 8) read and written, 6.6 in all. On an H200 that leaves about 57 instructions a weight at 80 % of the bandwidth of a copy,
so they count: Philox takes a quarter, and one call serves both the code and the moments of four weights.

One program walks one row: its matrix, scale and first element index are scalars, and its counts need no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqt_dist.config import STATE_BLOCK
from dqt_dist.kernels.launch import launch
from dqt_dist.lowbit.block_float import SIGNED_EXPONENT_MIN, UNSIGNED_EXPONENT_MIN
from dqt_dist.lowbit.coordinates import Purpose, row_words
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import RoundingKey

# Columns a program handles at once, a power of two, and its warps: 8 columns a thread, a 16-byte load of a bf16 gradient. One warp
# needs no barriers, and 256 divides more row lengths than larger blocks do.
BLOCK, NUM_WARPS = 256, 1


@triton.jit
def _interleave4(a, b, c, d):
    """[a0, b0, c0, d0, a1, ...]"""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _as_float(packed, POSITION: tl.constexpr, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr):
    """Field POSITION of packed bytes (int32) as a code, fp32: put on top of the mantissa of a number in [1, 2), since a conversion
    from int32 would cost three instructions more."""
    LEVELS: tl.constexpr = 1 << STORAGE_BITS
    mantissa = (packed << (23 - STORAGE_BITS - STORAGE_BITS * POSITION)) & ((LEVELS - 1) << (23 - STORAGE_BITS))
    return (mantissa | 0x3F800000).to(tl.float32, bitcast=True) * LEVELS - (LEVELS - QMIN)


@triton.jit
def _load_codes(
    codes_row, start, packed_columns, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Codes from column `start` on, fp32 [BLOCK]."""
    PER_BYTE: tl.constexpr = 8 // STORAGE_BITS
    offsets = start // PER_BYTE + tl.arange(0, BLOCK // PER_BYTE)
    packed = tl.load(codes_row + offsets, mask=None if WHOLE else offsets < packed_columns).to(tl.int32)
    # One return: Triton types every return statement, also those a constexpr condition leaves out.
    if STORAGE_BITS == 8:
        result = packed.to(tl.float32)
    elif STORAGE_BITS == 4:
        result = tl.interleave(_as_float(packed, 0, QMIN, 4), _as_float(packed, 1, QMIN, 4))
    else:
        result = _interleave4(
            _as_float(packed, 0, QMIN, 2),
            _as_float(packed, 1, QMIN, 2),
            _as_float(packed, 2, QMIN, 2),
            _as_float(packed, 3, QMIN, 2),
        )
    return result


@triton.jit
def _store_codes(
    codes_row, codes, start, packed_columns, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Packs fp32 codes [BLOCK]: a byte is the sum of its fields times powers of two, converted once."""
    PER_BYTE: tl.constexpr = 8 // STORAGE_BITS
    offsets = start // PER_BYTE + tl.arange(0, BLOCK // PER_BYTE)
    if STORAGE_BITS == 8:
        packed = codes.to(tl.int8)
    else:
        fields = tl.reshape(codes - QMIN, (BLOCK // PER_BYTE, PER_BYTE))
        weights = (1 << (tl.arange(0, PER_BYTE) * STORAGE_BITS)).to(tl.float32)
        packed = tl.sum(fields * weights[None, :], axis=1).to(tl.int32).to(tl.uint8)
    tl.store(codes_row + offsets, packed, mask=None if WHOLE else offsets < packed_columns)


@triton.jit
def _philox(key, counter, step, id_word):
    """The four words of int64 counters, key = second word << 32 | first (lowbit/coordinates.py). tl.philox would take the halves of
    each product by an instruction of its own."""
    c0 = (counter & 0xFFFFFFFF).to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + step.to(tl.uint32)
    c3 = tl.zeros_like(c0) + id_word
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product_1.to(tl.uint32)
        c3 = product_0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _draw(element, id_word, key, step, BLOCK: tl.constexpr):
    """The 32-bit words of BLOCK neighbouring elements from `element` on, a multiple of 4: uint32 [BLOCK]."""
    # Two counters for the 8 columns of a thread: words are where they are used.
    pair = element // 4 + 2 * tl.arange(0, BLOCK // 8).to(tl.int64)
    a0, a1, a2, a3 = _philox(key, pair, step, id_word)
    b0, b1, b2, b3 = _philox(key, pair + 1, step, id_word)
    return _interleave4(tl.interleave(a0, b0), tl.interleave(a1, b1), tl.interleave(a2, b2), tl.interleave(a3, b3))


@triton.jit
def _round(inside_grid, words, STOCHASTIC: tl.constexpr):
    """Wanted codes, clamped to the grid, to codes on it: fp32 [BLOCK]. Clamping first gives the same: a code at an end has no
    fraction, and one beyond it rounds to it or further out."""
    below = tl.floor(inside_grid)
    above_half = inside_grid - below
    if STOCHASTIC:
        uniform = (words >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
        up = uniform < above_half
    else:
        odd = below - 2.0 * tl.floor(below * 0.5)
        up = (above_half > 0.5) | ((above_half == 0.5) & (odd == 1.0))
    return below + tl.where(up, 1.0, 0.0)


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
    """Rounds finite `wanted` [BLOCK] and stores it over `old` (fp32 codes). Returns flips, zeros and clamped weights, fp32
    [BLOCK / 8] each."""
    inside_grid = tl.minimum(tl.maximum(wanted, QMIN), QMAX)
    new = _round(inside_grid, words, STOCHASTIC)
    flips = tl.where(new != old, 1.0, 0.0)
    zeros = tl.where(new == 0.0, 1.0, 0.0)
    clamped = tl.where(inside_grid != wanted, 1.0, 0.0)
    if not WHOLE:
        inside = start + tl.arange(0, BLOCK) < columns
        flips = tl.where(inside, flips, 0.0)
        zeros = tl.where(inside, zeros, 0.0)
        clamped = tl.where(inside, clamped, 0.0)
        # Columns past the end keep a zero field, as packing leaves it.
        new = tl.where(inside, new, QMIN)
    _store_codes(codes_row, new, start, packed_columns, QMIN, STORAGE_BITS, BLOCK, WHOLE)
    return _sum8(flips, BLOCK), _sum8(zeros, BLOCK), _sum8(clamped, BLOCK)


@triton.jit
def _sum8(x, BLOCK: tl.constexpr):
    """Sums of 8 neighbours, which one thread holds."""
    return tl.sum(tl.reshape(x, (BLOCK // 8, 8)), axis=1)


@triton.jit
def _store_counts(counts_row, flips, zeros, clamped):
    """Counts of a row; fp32 holds them exactly."""
    tl.store(counts_row, tl.sum(flips).to(tl.int32))
    tl.store(counts_row + 1, tl.sum(zeros).to(tl.int32))
    tl.store(counts_row + 2, tl.sum(clamped).to(tl.int32))


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
    STOCHASTIC: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    STORAGE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    element = tl.load(first_element + row)
    id_word = tl.load(matrix_id + row).to(tl.uint32)
    rate = learning_rate / tl.load(row_scale + row)
    codes_row = codes + row * packed_columns
    direction_row = direction + row * columns
    flips = tl.zeros((BLOCK // 8,), tl.float32)
    zeros = tl.zeros((BLOCK // 8,), tl.float32)
    clamped = tl.zeros((BLOCK // 8,), tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = None if WHOLE else offsets < columns
        old = _load_codes(codes_row, start, packed_columns, QMIN, STORAGE_BITS, BLOCK, WHOLE)
        wanted = old * decay_factor - tl.load(direction_row + offsets, mask=inside) * rate
        wanted = tl.where(tl.abs(wanted) < float("inf"), wanted, old)
        words = _draw(element + start, id_word, key, step, BLOCK)
        new_flips, new_zeros, new_clamped = _land(
            codes_row, old, wanted, words, start, columns, packed_columns,
            STOCHASTIC, QMIN, QMAX, STORAGE_BITS, BLOCK, WHOLE,
        )  # fmt: skip
        flips += new_flips
        zeros += new_zeros
        clamped += new_clamped
    _store_counts(counts + row * 3, flips, zeros, clamped)


def update_rows_triton(
    weight: LowBitMatrix,
    direction: Tensor,
    start: int,
    learning_rate: float,
    weight_decay: float,
    key: RoundingKey,
) -> Tensor:
    """As `update_rows_reference`; `direction` contiguous, on the device of the codes."""
    assert direction.dtype == torch.float32 and direction.is_contiguous()
    rows = direction.shape[0]
    counts = torch.empty(rows, 3, dtype=torch.int32, device=direction.device)
    launch(
        _update_kernel,
        (rows,),
        weight.packed(start, start + rows),
        direction,
        *_row_facts(weight, start, start + rows),
        counts,
        learning_rate,
        1.0 - learning_rate * weight_decay,
        int(Purpose.ROUND) << 32 | key.seed,
        key.step,
        weight.columns,
        weight.codes.shape[1],
        **_constants(weight, key),
    )
    return counts


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


@triton.jit
def _load_blocks(
    codes_row, exponents_row, start, columns, BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """Codes uint8 [BLOCK / STATE_BLOCK, STATE_BLOCK] and exponents int32 [BLOCK / STATE_BLOCK, 1]."""
    offsets = start + tl.arange(0, BLOCK)
    blocks = start // STATE_BLOCK + tl.arange(0, BLOCK // STATE_BLOCK)
    if WHOLE:
        codes = tl.load(codes_row + offsets)
        exponents = tl.load(exponents_row + blocks)
    else:
        codes = tl.load(codes_row + offsets, mask=offsets < columns, other=0)
        exponents = tl.load(exponents_row + blocks, mask=blocks < columns // STATE_BLOCK, other=0)
    return tl.reshape(codes, (BLOCK // STATE_BLOCK, STATE_BLOCK)), exponents.to(tl.int32)[:, None]


@triton.jit
def _store_blocks(
    codes_row, exponents_row, codes, exponents, start, columns, BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The inverse of `_load_blocks`; exponents [BLOCK / STATE_BLOCK]."""
    offsets = start + tl.arange(0, BLOCK)
    blocks = start // STATE_BLOCK + tl.arange(0, BLOCK // STATE_BLOCK)
    codes = tl.reshape(codes, (BLOCK,))
    tl.store(codes_row + offsets, codes, mask=None if WHOLE else offsets < columns)
    tl.store(exponents_row + blocks, exponents.to(tl.uint8), mask=None if WHOLE else blocks < columns // STATE_BLOCK)


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
    learning_rate,
    decay_factor,
    beta1,
    weight1,
    beta2,
    weight2,
    unbias1,
    unbias2,
    epsilon,
    key,
    step,
    columns,
    packed_columns,
    STATE_BITS: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    SIGNED_EXPONENT_MIN: tl.constexpr,
    UNSIGNED_EXPONENT_MIN: tl.constexpr,
    GRADIENT_LIMIT: tl.constexpr,
    DECAYS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    STORAGE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    element = tl.load(first_element + row)
    id_word = tl.load(matrix_id + row).to(tl.uint32)
    factor = tl.load(clip)
    # What a gradient is multiplied with before it goes into the moments.
    weight1 *= factor
    weight2 *= factor * factor
    # A step that is clipped to nothing must not move codes by its first moment either.
    rate = tl.where(factor > 0.0, learning_rate / tl.load(row_scale + row) * unbias1, 0.0)
    codes_row = codes + row * packed_columns
    gradient_row = gradient + row * columns
    exp_avg_row = exp_avg + row * columns
    second_row = second + row * columns
    exp_avg_scale_row = exp_avg_scale + row * (columns // STATE_BLOCK)
    second_scale_row = second_scale + row * (columns // STATE_BLOCK)
    flips = tl.zeros((BLOCK // 8,), tl.float32)
    zeros = tl.zeros((BLOCK // 8,), tl.float32)
    clamped = tl.zeros((BLOCK // 8,), tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = None if WHOLE else offsets < columns
        g = tl.load(gradient_row + offsets, mask=inside).to(tl.float32)
        g = tl.where(tl.abs(g) < GRADIENT_LIMIT, g, 0.0)
        words = _draw(element + start, id_word, key, step, BLOCK)
        if STATE_BITS == 8:
            # The formats of lowbit/block_float.py.
            m_codes, m_exponents = _load_blocks(
                exp_avg_row, exp_avg_scale_row, start, columns, BLOCK, STATE_BLOCK, WHOLE
            )
            m = m_codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            m_scale = _power_of_two(tl.maximum(m_exponents, SIGNED_EXPONENT_MIN) - 134)
            m = tl.reshape(m * (m_scale * beta1), (BLOCK,))
            v_codes, v_exponents = _load_blocks(second_row, second_scale_row, start, columns, BLOCK, STATE_BLOCK, WHOLE)
            v_shift = (tl.maximum(v_exponents, UNSIGNED_EXPONENT_MIN) - UNSIGNED_EXPONENT_MIN) << 23
            v = tl.reshape(((v_codes.to(tl.int32) << 20) + v_shift).to(tl.float32, bitcast=True), (BLOCK,))
        else:
            m = tl.load(exp_avg_row + offsets, mask=inside) * beta1
            v = tl.load(second_row + offsets, mask=inside)
        m += weight1 * g
        v = beta2 * v + weight2 * g * g
        if STATE_BITS == 8:
            noise = tl.reshape(((words & 255) << 12).to(tl.int32), (BLOCK // STATE_BLOCK, STATE_BLOCK))
            m_blocks = tl.reshape(m, (BLOCK // STATE_BLOCK, STATE_BLOCK))
            m_exponents = tl.max(tl.abs(m_blocks), axis=1).to(tl.int32, bitcast=True) >> 23
            y = m_blocks * _power_of_two(134 - tl.maximum(m_exponents, SIGNED_EXPONENT_MIN))[:, None]
            bits = (y.to(tl.int32, bitcast=True) + noise + 2048) & -1048576  # -2^20
            m_codes = bits.to(tl.float32, bitcast=True).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
            _store_blocks(
                exp_avg_row, exp_avg_scale_row, m_codes, m_exponents, start, columns, BLOCK, STATE_BLOCK, WHOLE
            )
            v_blocks = tl.reshape(v, (BLOCK // STATE_BLOCK, STATE_BLOCK))
            v_exponents = tl.max(v_blocks, axis=1).to(tl.int32, bitcast=True) >> 23
            v_shift = (tl.maximum(v_exponents, UNSIGNED_EXPONENT_MIN) - UNSIGNED_EXPONENT_MIN) << 23
            bits = v_blocks.to(tl.int32, bitcast=True) + noise + (2048 - v_shift)[:, None]
            v_codes = (tl.maximum(bits, 0) >> 20).to(tl.uint8)
            _store_blocks(second_row, second_scale_row, v_codes, v_exponents, start, columns, BLOCK, STATE_BLOCK, WHOLE)
        else:
            tl.store(exp_avg_row + offsets, m, mask=inside)
            tl.store(second_row + offsets, v, mask=inside)
        # 1/x as the square of 1/sqrt(x): two instructions where a division takes six.
        inverse = tl.rsqrt(tl.sqrt(v) * unbias2 + epsilon)
        old = _load_codes(codes_row, start, packed_columns, QMIN, STORAGE_BITS, BLOCK, WHOLE)
        # Finite, as the moments are: see GRADIENT_LIMIT.
        wanted = (old * decay_factor if DECAYS else old) - m * (inverse * inverse) * rate
        new_flips, new_zeros, new_clamped = _land(
            codes_row, old, wanted, words, start, columns, packed_columns,
            STOCHASTIC, QMIN, QMAX, STORAGE_BITS, BLOCK, WHOLE,
        )  # fmt: skip
        flips += new_flips
        zeros += new_zeros
        clamped += new_clamped
    _store_counts(counts + row * 3, flips, zeros, clamped)


def adamw_update_rows_triton(
    weight: LowBitMatrix,
    gradient: Tensor,
    moments: dict[str, Tensor],
    start: int,
    clip: Tensor,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    gradient_limit: float,
    key: RoundingKey,
) -> Tensor:
    """As `adamw_update_rows_reference` of optim/adamw.py; gradient and moments contiguous, on the device of the codes."""
    exp_avg, second = moments["exp_avg"], moments["exp_avg_sq"]
    state_bits = exp_avg.itemsize * 8
    # Unused with 32 bits.
    scales = moments.get("exp_avg_scale", exp_avg), moments.get("exp_avg_sq_scale", second)
    assert state_bits == 32 or weight.columns % STATE_BLOCK == 0, weight.columns
    assert all(tensor.is_contiguous() for tensor in (gradient, exp_avg, second, *scales))
    rows = gradient.shape[0]
    counts = torch.empty(rows, 3, dtype=torch.int32, device=gradient.device)
    beta1, beta2 = betas
    launch(
        _adamw_kernel,
        (rows,),
        weight.packed(start, start + rows),
        gradient,
        exp_avg,
        scales[0],
        second,
        scales[1],
        *_row_facts(weight, start, start + rows),
        counts,
        clip,
        learning_rate,
        1.0 - learning_rate * weight_decay,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        1.0 / (1.0 - beta1**key.step),
        1.0 / (1.0 - beta2**key.step) ** 0.5,
        epsilon,
        int(Purpose.ROUND) << 32 | key.seed,
        key.step,
        weight.columns,
        weight.codes.shape[1],
        STATE_BITS=state_bits,
        STATE_BLOCK=STATE_BLOCK,
        SIGNED_EXPONENT_MIN=SIGNED_EXPONENT_MIN,
        UNSIGNED_EXPONENT_MIN=UNSIGNED_EXPONENT_MIN,
        GRADIENT_LIMIT=gradient_limit,
        DECAYS=weight_decay > 0,
        **_constants(weight, key),
    )
    return counts
