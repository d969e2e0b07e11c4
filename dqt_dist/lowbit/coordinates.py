"""Logical coordinates: where each local element lies in the model, independent of the process grid.

A *logical matrix* is one Hugging Face linear (`layers.17.mlp.up_proj`). A *shard* is the 2-D tensor that a rank holds.
A shard may be a slice of a logical matrix, or a fusion of several matrices (Megatron's qkv, interleaved per query
group, and gate|up):

    shard rows            logical rows                         columns
    0    .. n0-1          matrix a, rows r0 .. r0+n0-1         column_offset ..
    n0   .. n0+n1-1       matrix b, rows r1 .. r1+n1-1         column_offset + columns - 1
    ...

Every random draw and every statistic is a function of these coordinates, so neither can depend on TP, PP, DP or ZeRO:

    u(purpose, seed, step, matrix, row, column) = Philox4x32-10(counter, key) mapped to [0, 1)
    counter = (e >> 2 low word, e >> 2 high word, step, id(matrix))    e = row * in_features + column, lane e & 3
    key     = (seed, purpose)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from dqt_dist.config import CODES_PER_GROUP
from dqt_dist.lowbit.philox import CPU_CHUNK, MASK32, philox4x32, to_unit_interval


class Purpose(IntEnum):
    """What a draw is for. It is the second key word, so two purposes never share a random number."""

    INIT = 1
    ROUND = 2


@dataclass(frozen=True)
class LogicalMatrix:
    """One weight of the model under its Hugging Face name. A vector (a norm's weight) is a matrix with one column."""

    name: str
    rows: int
    columns: int

    @property
    def id(self) -> int:
        """32-bit hash of the name: the last counter word of its draws."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "little")


@dataclass(frozen=True)
class RowBlock:
    """`num_rows` consecutive shard rows that are consecutive rows of one logical matrix."""

    matrix: int
    """Index into ShardLayout.matrices."""
    row: int
    """First row in the logical matrix."""
    num_rows: int


@dataclass(frozen=True)
class ShardLayout:
    """The logical coordinates of each row and column of a shard.

    Blocks are in shard order. All matrices have the same number of columns.
    """

    matrices: tuple[LogicalMatrix, ...]
    blocks: tuple[RowBlock, ...]
    columns: int
    """Number of local columns."""
    column_offset: int = 0

    @property
    def rows(self) -> int:
        return sum(block.num_rows for block in self.blocks)

    @property
    def in_features(self) -> int:
        return self.matrices[0].columns

    def row_matrix(self) -> Tensor:
        """Index of the logical matrix of each shard row, int64 [rows]."""
        return torch.cat([torch.full((block.num_rows,), block.matrix) for block in self.blocks])

    def row_logical(self) -> Tensor:
        """Row within its logical matrix of each shard row, int64 [rows]."""
        return torch.cat([torch.arange(block.row, block.row + block.num_rows) for block in self.blocks])

    def pieces(self, start: int, stop: int) -> Iterator[tuple[LogicalMatrix, int, int, int]]:
        """Splits shard rows [start, stop) at block borders: (matrix, logical row, shard row, number of rows)."""
        first = 0
        for block in self.blocks:
            low, high = max(start, first), min(stop, first + block.num_rows)
            if low < high:
                yield self.matrices[block.matrix], block.row + low - first, low, high - low
            first += block.num_rows


@lru_cache(maxsize=512)
def row_words(layout: ShardLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """First element index and matrix id of each shard row, int64 [rows], on `device`."""
    ids = torch.tensor([matrix.id for matrix in layout.matrices])
    first_element = layout.row_logical() * layout.in_features + layout.column_offset
    return first_element.to(device), ids[layout.row_matrix()].to(device)


def random_words(
    purpose: Purpose, seed: int, step: int, layout: ShardLayout, start: int, stop: int, device: torch.device
) -> Tensor:
    """The 32-bit words of shard rows [start, stop): int64 [stop - start, layout.columns]."""
    first_element, matrix_id = (words[start:stop, None] for words in row_words(layout, device))
    key = (seed, int(purpose))
    step_word = torch.tensor(step, device=device)
    if not any(n % CODES_PER_GROUP for n in (layout.in_features, layout.column_offset, layout.columns)):
        # Four neighbouring columns share one counter. One call gives the words of all four lanes.
        group = torch.arange(layout.columns // CODES_PER_GROUP, device=device)
        words = torch.empty(stop - start, len(group), CODES_PER_GROUP, dtype=torch.int64, device=device)
        rows_at_once = max(1, CPU_CHUNK // max(1, len(group))) if device.type == "cpu" else stop - start
        for low in range(0, stop - start, rows_at_once):
            rows = slice(low, low + rows_at_once)
            counter = first_element[rows] // CODES_PER_GROUP + group
            lanes = philox4x32((counter & MASK32, counter >> 32, step_word, matrix_id[rows]), key)
            torch.stack(lanes, dim=-1, out=words[rows])
        return words.view(stop - start, layout.columns)
    element = first_element + torch.arange(layout.columns, device=device)
    counter = element >> 2
    lanes = philox4x32((counter & MASK32, counter >> 32, step_word, matrix_id), key)
    return torch.stack(lanes, dim=-1).gather(-1, (element & 3)[..., None]).squeeze(-1)


def uniform(
    purpose: Purpose, seed: int, step: int, layout: ShardLayout, start: int, stop: int, device: torch.device
) -> Tensor:
    """u in [0, 1) for shard rows [start, stop): fp32 [stop - start, layout.columns]."""
    return to_unit_interval(random_words(purpose, seed, step, layout, start, stop, device))


NORMAL_LEVELS = 1 << 16


@lru_cache(maxsize=1)
def normal_quantiles() -> Tensor:
    """Standard normal quantiles at (k + 1/2) / 65536, fp32 [65536].

    A table replaces Box-Muller because logarithms and cosines differ in the last bit between devices, and between the
    vector body and the tail of a CPU loop. A table look-up gives the same bits everywhere. The table ends at 4.32
    standard deviations.
    """
    inverse = NormalDist().inv_cdf
    half = [inverse((k + 0.5) / NORMAL_LEVELS) for k in range(NORMAL_LEVELS // 2)]
    return torch.tensor(half + [-z for z in reversed(half)], dtype=torch.float32)


def normal(seed: int, layout: ShardLayout, start: int, stop: int, device: torch.device) -> Tensor:
    """Standard normal values for shard rows [start, stop), fp32: the same bits in every layout and on every device."""
    words = random_words(Purpose.INIT, seed, 0, layout, start, stop, device)
    return normal_quantiles().to(device)[words >> 16]
