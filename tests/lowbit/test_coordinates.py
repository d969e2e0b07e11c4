"""Draws are a function of logical coordinates: a shard gets the draws that the whole model has at its place."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dqt_dist.lowbit.coordinates import (
    LogicalMatrix,
    Purpose,
    RowBlock,
    ShardLayout,
    normal,
    normal_quantiles,
    random_words,
    uniform,
)
from dqt_dist.lowbit.philox import CPU_CHUNK
from tests.lowbit.reference import word_at

CPU = torch.device("cpu")
SEED, STEP = 1234, 56


def whole(matrix: LogicalMatrix) -> ShardLayout:
    """The layout of a rank that holds all of one matrix."""
    return ShardLayout((matrix,), (RowBlock(0, 0, matrix.rows),), matrix.columns)


def words(layout: ShardLayout, purpose: Purpose = Purpose.ROUND, seed: int = SEED, step: int = STEP) -> Tensor:
    return random_words(purpose, seed, step, layout, 0, layout.rows, CPU)


def cut_from_whole(layout: ShardLayout) -> Tensor:
    """What `words(layout)` must be: each block sliced out of the words of its whole matrix."""
    columns = slice(layout.column_offset, layout.column_offset + layout.columns)
    blocks = [
        words(whole(layout.matrices[block.matrix]))[block.row : block.row + block.num_rows, columns]
        for block in layout.blocks
    ]
    return torch.cat(blocks)


def test_words_are_those_of_the_definition() -> None:
    """Against Python integers; both code paths (columns a multiple of 4, and not)."""
    for columns in (8, 7):
        matrix = LogicalMatrix("layers.0.mlp.up_proj", 5, columns)
        expected = [
            [word_at(Purpose.ROUND, SEED, STEP, matrix.id, columns, row, column) for column in range(columns)]
            for row in range(5)
        ]
        assert words(whole(matrix)).tolist() == expected


@pytest.mark.parametrize("offset", [0, 3])
def test_elements_beyond_2_to_the_34_use_the_high_counter_word(offset: int) -> None:
    """Offset 3 takes the gather path. Control: with e >> 2 cut to 32 bits the last rows repeat earlier draws."""
    matrix = LogicalMatrix("embed_tokens", 1 << 20, 1 << 16)
    last = ShardLayout((matrix,), (RowBlock(0, matrix.rows - 2, 2),), 8, column_offset=offset)
    expected = [
        [word_at(Purpose.ROUND, SEED, STEP, matrix.id, matrix.columns, row, offset + column) for column in range(8)]
        for row in (matrix.rows - 2, matrix.rows - 1)
    ]
    assert (matrix.rows * matrix.columns) >> 2 > 1 << 32
    assert words(last).tolist() == expected


def test_row_shard_is_a_slice_of_the_whole() -> None:
    matrix = LogicalMatrix("layers.3.mlp.up_proj", 24, 20)
    for rank in range(3):
        shard = ShardLayout((matrix,), (RowBlock(0, 8 * rank, 8),), 20)
        assert torch.equal(words(shard), words(whole(matrix))[8 * rank : 8 * rank + 8])


def test_column_shard_is_a_slice_of_the_whole() -> None:
    """Control: without column_offset rank 1 would repeat the draws of rank 0."""
    matrix = LogicalMatrix("layers.3.mlp.down_proj", 12, 32)
    left, right = (ShardLayout((matrix,), (RowBlock(0, 0, 12),), 16, column_offset=offset) for offset in (0, 16))
    assert torch.equal(torch.cat([words(left), words(right)], dim=1), words(whole(matrix)))
    assert not torch.equal(words(left), words(right))


def test_interleaved_qkv_shard_is_cut_from_its_matrices() -> None:
    """Two query groups of two heads of width 4: q0 q1 k v | q2 q3 k v, as Megatron fuses them."""
    q, k, v = (LogicalMatrix(f"layers.0.self_attn.{x}_proj", rows, 16) for x, rows in (("q", 16), ("k", 8), ("v", 8)))
    blocks = [RowBlock(0, 0, 8), RowBlock(1, 0, 4), RowBlock(2, 0, 4), RowBlock(0, 8, 8), RowBlock(1, 4, 4)]
    blocks.append(RowBlock(2, 4, 4))
    fused = ShardLayout((q, k, v), tuple(blocks), 16)
    assert torch.equal(words(fused), cut_from_whole(fused))
    assert fused.row_matrix().tolist() == ([0] * 8 + [1] * 4 + [2] * 4) * 2
    assert fused.row_logical().tolist() == [*range(8), *range(4), *range(4), *range(8, 16), *range(4, 8), *range(4, 8)]


@pytest.mark.parametrize(("columns", "offset"), [(8, 1), (6, 0), (7, 8), (12, 3)])
def test_the_gather_path_gives_the_words_of_the_fast_path(columns: int, offset: int) -> None:
    """Fast: in_features, offset and columns all multiples of 4. A cut that breaks one of them gathers instead."""
    matrix = LogicalMatrix("layers.1.self_attn.o_proj", 6, 16)
    shard = ShardLayout((matrix,), (RowBlock(0, 0, 6),), columns, column_offset=offset)
    assert torch.equal(words(shard), words(whole(matrix))[:, offset : offset + columns])


def test_working_in_chunks_changes_nothing() -> None:
    """More counters than one CPU chunk holds, in a fused shard: matrices and rows differ after the chunk border."""
    gate, up = (LogicalMatrix(f"layers.2.mlp.{x}_proj", 350, 512) for x in ("gate", "up"))
    fused = ShardLayout((gate, up), (RowBlock(0, 0, 350), RowBlock(1, 0, 350)), 512)
    assert CPU_CHUNK < fused.rows * fused.columns // 4 < 2 * CPU_CHUNK
    rows = [0, 349, 350, 511, 512, 699]
    row_by_row = [random_words(Purpose.ROUND, SEED, STEP, fused, row, row + 1, CPU) for row in rows]
    assert torch.equal(words(fused)[rows], torch.cat(row_by_row))


@st.composite
def shards(draw: st.DrawFn) -> tuple[ShardLayout, int, int]:
    """A fused shard of up to three matrices cut at random, and a range of its rows."""
    in_features = draw(st.integers(1, 24))
    offset = draw(st.integers(0, in_features - 1))
    columns = draw(st.integers(1, in_features - offset))
    num_matrices = draw(st.integers(1, 3))
    matrices = tuple(LogicalMatrix(f"m{i}", draw(st.integers(1, 12)), in_features) for i in range(num_matrices))
    blocks = []
    for _ in range(draw(st.integers(1, 5))):
        index = draw(st.integers(0, num_matrices - 1))
        row = draw(st.integers(0, matrices[index].rows - 1))
        blocks.append(RowBlock(index, row, draw(st.integers(1, matrices[index].rows - row))))
    layout = ShardLayout(matrices, tuple(blocks), columns, offset)
    start = draw(st.integers(0, layout.rows - 1))
    return layout, start, draw(st.integers(start + 1, layout.rows))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shards())
def test_any_cut_draws_what_the_whole_draws(cut: tuple[ShardLayout, int, int]) -> None:
    layout, start, stop = cut
    expected = cut_from_whole(layout)
    assert torch.equal(words(layout), expected)
    assert torch.equal(random_words(Purpose.ROUND, SEED, STEP, layout, start, stop, CPU), expected[start:stop])
    top_bits = (expected[start:stop] >> 8).double() / 2**24
    assert torch.equal(uniform(Purpose.ROUND, SEED, STEP, layout, start, stop, CPU).double(), top_bits)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shards())
def test_any_cut_starts_from_the_same_normal_values(cut: tuple[ShardLayout, int, int]) -> None:
    layout, start, stop = cut
    columns = slice(layout.column_offset, layout.column_offset + layout.columns)
    blocks = [
        normal(SEED, whole(m := layout.matrices[block.matrix]), 0, m.rows, CPU)[
            block.row : block.row + block.num_rows, columns
        ]
        for block in layout.blocks
    ]
    assert torch.equal(normal(SEED, layout, start, stop, CPU), torch.cat(blocks)[start:stop])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shards())
def test_pieces_cover_the_rows_in_order(cut: tuple[ShardLayout, int, int]) -> None:
    layout, start, stop = cut
    seen = []
    for matrix, logical_row, shard_row, num_rows in layout.pieces(start, stop):
        seen += [(matrix.name, logical_row + i, shard_row + i) for i in range(num_rows)]
    names = [layout.matrices[index].name for index in layout.row_matrix().tolist()]
    everything = list(zip(names, layout.row_logical().tolist(), range(layout.rows), strict=True))
    assert seen == everything[start:stop]


def test_every_argument_of_a_draw_changes_every_word() -> None:
    """4096 words each; by chance two words agree once in a million such comparisons."""
    matrix = LogicalMatrix("layers.0.mlp.up_proj", 64, 64)
    base = words(whole(matrix))
    others = {
        "purpose": words(whole(matrix), purpose=Purpose.INIT),
        "seed": words(whole(matrix), seed=SEED + 1),
        "step": words(whole(matrix), step=STEP + 1),
        "matrix": words(whole(LogicalMatrix("layers.1.mlp.up_proj", 64, 64))),
    }
    for name, other in others.items():
        assert not bool((other == base).any()), name
    assert torch.equal(words(whole(matrix)), base)
    assert len(base.unique()) == base.numel()


def names_of_a_llama(num_layers: int) -> list[str]:
    linears = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    norms = ["input_layernorm", "post_attention_layernorm", "self_attn.attn_sub_norm", "mlp.ffn_sub_norm"]
    return ["embed_tokens", "norm", "lm_head"] + [f"layers.{i}.{x}" for i in range(num_layers) for x in linears + norms]


def test_ids_of_an_80_layer_model_are_distinct() -> None:
    """883 names in 2^32: a chance collision has probability 1e-4, and this says there is none."""
    ids = {LogicalMatrix(name, 1, 1).id for name in names_of_a_llama(80)}
    assert len(ids) == len(names_of_a_llama(80)) == 3 + 80 * 11
    assert all(0 <= i < 1 << 32 for i in ids)


def test_ids_never_change() -> None:
    """Initial weights and all draws of a resumed run depend on the ids. sha256, unlike Python's hash, is not salted."""
    assert LogicalMatrix("layers.17.mlp.up_proj", 1, 1).id == 0x2B43CBA0
    assert LogicalMatrix("a", 1, 1).id == LogicalMatrix("a", 2, 3).id


def test_normal_takes_the_quantile_of_the_top_16_bits() -> None:
    """The definition, element by element: initial weights may not change between versions."""
    matrix = LogicalMatrix("layers.0.mlp.up_proj", 3, 5)
    expected = [[word_at(Purpose.INIT, SEED, 0, matrix.id, 5, i, j) >> 16 for j in range(5)] for i in range(3)]
    assert torch.equal(normal(SEED, whole(matrix), 0, 3, CPU), normal_quantiles()[torch.tensor(expected)])


def test_normal_is_standard_normal() -> None:
    """Mean, variance and the share within one sigma, each within five standard errors."""
    matrix = LogicalMatrix("layers.0.mlp.up_proj", 512, 256)
    z = normal(SEED, whole(matrix), 0, 512, CPU).double()
    count = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(count)
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / count)
    within = math.erf(1 / math.sqrt(2))
    assert abs(float((z.abs() < 1).double().mean()) - within) < 5 * math.sqrt(within * (1 - within) / count)


def test_quantile_table_is_symmetric_sorted_and_ends_at_4_32() -> None:
    table = normal_quantiles()
    assert table.shape == (65536,) and bool((table[1:] > table[:-1]).all())
    assert torch.equal(table, -table.flip(0))
    assert abs(float(table[-1]) - 4.32) < 0.01
    # Phi of each quantile is the middle of its bin again; erf in float64 on values rounded to fp32.
    phi = 0.5 * (1 + torch.erf(table.double() / math.sqrt(2)))
    assert float((phi - (torch.arange(65536) + 0.5) / 65536).abs().max()) < 2.0**-24
