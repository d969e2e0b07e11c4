# pyright: reportMissingImports=false, reportIndexIssue=false
"""The rounding update in Triton: direction in, packed codes rewritten in place, one pass.

Floor for a ternary weight: 4 bytes of fp32 direction read, 1/4 byte of codes read and written, so 4.5 bytes; the ten Philox
rounds for every four weights hide behind them. The definition is `dqt_dist.lowbit.update.update_rows_reference`; this kernel
draws the same 32-bit words and differs from it only where the fp32 arithmetic of t is contracted to fused multiply-adds.

One program walks one row: its matrix, scale and first element index are scalars, and its counts need no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqt_dist.lowbit.coordinates import Purpose, row_words
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import RoundingKey

# Columns a program handles at once: a power of two that fills 4 warps with 8 columns a thread.
BLOCK = 1024


@triton.jit
def _interleave4(a, b, c, d):
    """[a0, b0, c0, d0, a1, ...]"""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _load_codes(codes_row, start, packed_columns, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """int32 codes [BLOCK] from column `start` on."""
    PER_BYTE: tl.constexpr = 8 // STORAGE_BITS
    offsets = start // PER_BYTE + tl.arange(0, BLOCK // PER_BYTE)
    packed = tl.load(codes_row + offsets, mask=offsets < packed_columns, other=0).to(tl.int32)
    # One return: Triton types every return statement, also those a constexpr condition leaves out.
    if STORAGE_BITS == 8:
        result = packed
    elif STORAGE_BITS == 4:
        result = tl.interleave(packed & 15, (packed >> 4) & 15) + QMIN
    else:
        result = _interleave4(packed & 3, (packed >> 2) & 3, (packed >> 4) & 3, (packed >> 6) & 3) + QMIN
    return result


@triton.jit
def _store_codes(
    codes_row, codes, start, packed_columns, QMIN: tl.constexpr, STORAGE_BITS: tl.constexpr, BLOCK: tl.constexpr
):
    PER_BYTE: tl.constexpr = 8 // STORAGE_BITS
    offsets = start // PER_BYTE + tl.arange(0, BLOCK // PER_BYTE)
    if STORAGE_BITS == 8:
        packed = codes.to(tl.int8)
    else:
        fields = tl.reshape(codes - QMIN, (BLOCK // PER_BYTE, PER_BYTE))
        shifts = tl.arange(0, PER_BYTE) * STORAGE_BITS
        packed = tl.sum(fields << shifts[None, :], axis=1).to(tl.uint8)
    tl.store(codes_row + offsets, packed, mask=offsets < packed_columns)


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
):
    row = tl.program_id(0).to(tl.int64)
    element = tl.load(first_element + row)
    id_word = tl.load(matrix_id + row).to(tl.uint32)
    rate = learning_rate / tl.load(row_scale + row)
    codes_row = codes + row * packed_columns
    direction_row = direction + row * columns
    flips = tl.zeros((), tl.int32)
    zeros = tl.zeros((), tl.int32)
    clamped = tl.zeros((), tl.int32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        old = _load_codes(codes_row, start, packed_columns, QMIN, STORAGE_BITS, BLOCK)
        old_float = old.to(tl.float32)
        wanted = old_float * decay_factor - tl.load(direction_row + offsets, mask=inside, other=0.0) * rate
        wanted = tl.where(tl.abs(wanted) < float("inf"), wanted, old_float)
        if STOCHASTIC:
            counter = (element + start) // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)
            low = (counter & 0xFFFFFFFF).to(tl.uint32)
            high = (counter >> 32).to(tl.uint32)
            step_word = tl.zeros_like(low) + step.to(tl.uint32)
            w0, w1, w2, w3 = tl.philox(key, low, high, step_word, tl.zeros_like(low) + id_word)
            uniform = (_interleave4(w0, w1, w2, w3) >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
            below = tl.floor(wanted)
            new = below + tl.where(uniform < wanted - below, 1.0, 0.0)
        else:
            below = tl.floor(wanted)
            above_half = wanted - below
            odd = below - 2.0 * tl.floor(below * 0.5)
            new = below + tl.where((above_half > 0.5) | ((above_half == 0.5) & (odd == 1.0)), 1.0, 0.0)
        new_codes = tl.minimum(tl.maximum(new, QMIN), QMAX).to(tl.int32)
        flips += tl.sum(((new_codes != old) & inside).to(tl.int32))
        zeros += tl.sum(((new_codes == 0) & inside).to(tl.int32))
        clamped += tl.sum((((wanted < QMIN) | (wanted > QMAX)) & inside).to(tl.int32))
        # Columns past the end keep a zero field, as packing leaves it.
        _store_codes(codes_row, tl.where(inside, new_codes, QMIN), start, packed_columns, QMIN, STORAGE_BITS, BLOCK)
    tl.store(counts + row * 3, flips)
    tl.store(counts + row * 3 + 1, zeros)
    tl.store(counts + row * 3 + 2, clamped)


def update_rows_triton(
    weight: LowBitMatrix,
    direction: Tensor,
    start: int,
    learning_rate: float,
    weight_decay: float,
    key: RoundingKey,
) -> Tensor:
    """As `update_rows_reference`; `direction` contiguous, on the device of the codes."""
    assert weight.layout is not None and direction.dtype == torch.float32 and direction.is_contiguous()
    rows = direction.shape[0]
    first_element, matrix_id = row_words(weight.layout, direction.device)
    counts = torch.empty(rows, 3, dtype=torch.int32, device=direction.device)
    grid = weight.grid
    _update_kernel[(rows,)](
        weight.packed(start, start + rows),
        direction,
        first_element[start : start + rows],
        matrix_id[start : start + rows],
        weight.row_scale()[start : start + rows],
        counts,
        learning_rate,
        1.0 - learning_rate * weight_decay,
        int(Purpose.ROUND) << 32 | key.seed,
        key.step,
        weight.columns,
        weight.codes.shape[1],
        STOCHASTIC=key.mode == "stochastic",
        QMIN=grid.qmin,
        QMAX=grid.qmax,
        STORAGE_BITS=grid.storage_bits,
        BLOCK=BLOCK,
    )
    return counts.long()
