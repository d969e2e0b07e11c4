"""The initial model is the same in every layout, bit for bit, and the parts of the ranks cover it without overlap."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from dqt_dist.layers import initialize
from dqt_dist.layers.parameters import low_bit_matrices, parameters
from dqt_dist.lowbit.coordinates import ShardLayout
from dqt_dist.plan import largest_rank
from tests.distributed import run_distributed
from tests.parallel.runs import Whole, assert_equal, start, whole_state
from tests.small import small_config

METHODS = {
    "ternary": (),
    "4 bit": ("quantization.bits=4",),
    "8 bit": ("quantization.bits=8",),
    "embeddings": ("quantization.embeddings=true",),
    "sub-norms": ("model.sub_norm=true",),
    "bitnet": ("quantization.method=bitnet",),
    "none": ("quantization.method=none",),
}
# Ranks and overrides. Four query groups and four layers, so that TP 4 and an interleaved PP 2 divide them.
SHAPE = ("model.num_query_groups=4", "model.num_layers=4")
LAYOUTS = {
    "TP 2": (2, "parallel.tensor=2"),
    "TP 4": (4, "parallel.tensor=4"),
    "PP 2": (2, "parallel.pipeline=2"),
    "PP 2 interleaved": (2, "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    "TP 2 PP 2": (4, "parallel.tensor=2", "parallel.pipeline=2"),
    "DP 2 ZeRO 1": (2, "deepspeed.zero_optimization.stage=1"),
}


def initial_state(rank: int, world_size: int, *overrides: str) -> Whole:
    """`whole_state` also checks that ranks with the same element hold the same bits."""
    return whole_state(start(*overrides))


@functools.cache
def in_one_process(*overrides: str) -> Whole:
    return run_distributed(initial_state, 1, *overrides)[0]


CASES = [(layout, method) for layout in LAYOUTS for method in ("ternary", "bitnet", "none")]
CASES += [("TP 2 PP 2", method) for method in ("4 bit", "8 bit", "sub-norms", "embeddings")]


@pytest.mark.parametrize(("layout", "method"), CASES)
def test_initial_codes_scales_and_parameters_are_the_same_bits_in_every_layout(layout: str, method: str) -> None:
    world_size, *parallel = LAYOUTS[layout]
    found = run_distributed(initial_state, world_size, *SHAPE, *METHODS[method], *parallel)[0]
    assert_equal(found, in_one_process(*SHAPE, *METHODS[method]))


def test_codes_follow_the_seed() -> None:
    """Negative control of the test above: another seed gives other bits, so the values are really drawn."""
    other = run_distributed(initial_state, 1, *SHAPE, "training.seed=7")[0]
    wanted = in_one_process(*SHAPE)
    same = [name for name in wanted if name.startswith("codes/") and torch.equal(other[name], wanted[name])]
    assert same == []


def drawn_a_few_rows_at_once(rank: int, world_size: int, weights_at_once: int) -> Whole:
    usual, initialize.WEIGHTS_PER_DRAW = initialize.WEIGHTS_PER_DRAW, {"cpu": weights_at_once}
    try:
        return initial_state(rank, world_size, *SHAPE)
    finally:
        initialize.WEIGHTS_PER_DRAW = usual


def test_initial_values_do_not_depend_on_how_many_are_drawn_at_once() -> None:
    assert_equal(run_distributed(drawn_a_few_rows_at_once, 1, 100)[0], in_one_process(*SHAPE))


# ---- coordinates ----


def elements(layout: ShardLayout) -> list[tuple[str, int, int, int]]:
    """(matrix, logical row, first column, columns) of each local row."""
    return [
        (matrix.name, first_row + i, layout.column_offset, layout.columns)
        for matrix, first_row, _, count in layout.pieces(0, layout.rows)
        for i in range(count)
    ]


def shapes(layout: ShardLayout) -> dict[str, tuple[int, int]]:
    return {matrix.name: (matrix.rows, matrix.columns) for matrix in layout.matrices}


def layouts_of_rank(
    rank: int, world_size: int, *overrides: str
) -> tuple[int, list[tuple[bool, ShardLayout]], int, int]:
    """Data-parallel rank, (counted here, layout) of every weight, and number of weights in linears and elsewhere."""
    run = start(*overrides)
    low_bit = [weight.layout for weight in low_bit_matrices(run.model_chunks)]
    other = [(p.replicated, p.layout) for p in parameters(run.model_chunks)]
    is_linear = ["_proj" in layout.matrices[0].name for _, layout in other]
    linear = sum(layout.rows * layout.columns for layout in low_bit if layout is not None)
    linear += sum(layout.rows * layout.columns for (_, layout), yes in zip(other, is_linear, strict=True) if yes)
    rest = sum(layout.rows * layout.columns for (_, layout), yes in zip(other, is_linear, strict=True) if not yes)
    first_of_tensor = run.groups.tensor.rank() == 0
    counted = [(True, layout) for layout in low_bit if layout is not None]
    counted += [(first_of_tensor or not replicated, layout) for replicated, layout in other]
    assert dist.get_world_size() == world_size
    return run.groups.data.rank(), counted, linear, rest


@pytest.mark.parametrize(
    ("layout", "method"), [("TP 4", "none"), ("PP 2 interleaved", "sub-norms"), ("TP 2 PP 2", "sub-norms")]
)
def test_layouts_cover_every_element_of_the_model_exactly_once(layout: str, method: str) -> None:
    world_size, *parallel = LAYOUTS[layout]
    overrides = (*SHAPE, *METHODS[method], *parallel)
    ranks = run_distributed(layouts_of_rank, world_size, *overrides)
    held: Counter[tuple[str, int, int]] = Counter()
    wanted: dict[str, tuple[int, int]] = {}
    for data_rank, counted, _, _ in ranks:
        for is_counted, part in counted:
            wanted |= shapes(part)
            if data_rank == 0 and is_counted:
                for name, row, column, columns in elements(part):
                    held.update((name, row, c) for c in range(column, column + columns))
    assert set(held.values()) == {1}
    assert set(held) == {
        (n, r, c) for n, (rows, columns) in wanted.items() for r in range(rows) for c in range(columns)
    }

    config = small_config(*overrides)
    assert len(wanted) == 3 + config.model.num_layers * (11 if config.model.sub_norm else 9)
    largest = largest_rank(config)
    assert (largest.linear, largest.other) == (ranks[-1][2], ranks[-1][3])
