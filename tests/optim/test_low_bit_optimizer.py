"""ZeRO over rows, from given gradients: the bits do not depend on stage, number of ranks and division of rows."""

from __future__ import annotations

import pytest
import torch

from dqt_dist.lowbit.grid import make_grid
from dqt_dist.optim.schedule import StepRates
from dqt_dist.parallel.row_sharding import row_bounds
from tests.distributed import run_distributed
from tests.parallel.runs import Whole, assert_equal, start, whole_state

STEPS = 5
KINDS = ("codes/", "scale/", "low_bit.")


def given_gradients(rank: int, world_size: int, num_parts: int, *overrides: str) -> tuple[Whole, list[float]]:
    """Five updates from gradients that are a function of (step, part). Returns the low-bit state and the norms.

    Each of several ranks holds one part. A single rank holds the mean of all parts, taken in rank order.
    """
    run = start(*overrides, f"training.global_batch_size={2 * world_size}")  # one micro-batch
    low_bit, reducer, norms = run.optimizer.low_bit, run.optimizer.reducer, []
    reducer.buffers = low_bit.gradients
    for step in range(1, STEPS + 1):
        for index, rows in enumerate(low_bit.rows):
            parts = []
            for part in range(num_parts):
                generator = torch.Generator().manual_seed(1000 * step + 100 * part + index)
                parts.append(torch.randn(rows.weight.rows, rows.weight.columns, generator=generator))
            rows.gradient.add(parts[rank] if world_size > 1 else sum(parts[1:], parts[0]) / num_parts)
        reducer.finish()
        total = reducer.square_norm(low_bit.gradients)
        torch.distributed.all_reduce(total)
        norms.append(float(total.sqrt()))
        low_bit.begin_step(StepRates(step, 5e-3, 5e-3))
        low_bit.update(torch.tensor(0.5), total.sqrt().float())
        low_bit.gather_codes()
    return {name: tensor for name, tensor in whole_state(run).items() if name.startswith(KINDS)}, norms


CASES: list[tuple[int, int, str]] = [
    (3, zero, f"quantization.bits={bits}") for zero in range(4) for bits in ("ternary", 4, 8)
]
CASES += [(2, zero, "quantization.bits=ternary") for zero in range(4)]
CASES += [(3, zero, "optimizer.second_moment=factored") for zero in range(4)]


@pytest.mark.parametrize(("ranks", "zero", "setting"), CASES)
def test_codes_and_moments_after_five_updates_have_the_same_bits(ranks: int, zero: int, setting: str) -> None:
    """32, 64 and 96 rows over 3 ranks are uneven shares. One rank that gets the mean has the same bits too."""
    stage = f"deepspeed.zero_optimization.stage={zero}"
    found, norms = run_distributed(given_gradients, ranks, ranks, setting, stage)[0]
    wanted, wanted_norms = run_distributed(given_gradients, 1, ranks, setting)[0]
    assert_equal(found, wanted)
    # The norms are sums of squares in fp64, whose elements are divided over ranks in different ways.
    assert norms == pytest.approx(wanted_norms, rel=1e-14)


def owned(rank: int, world_size: int, *overrides: str) -> list[tuple[int, int, int, int, int]]:
    """(rows, first and last owned, elements of the moments, bytes of the codes) of each shard."""
    return [
        (rows.weight.rows, rows.start, rows.stop, sum(t.numel() for t in rows.state.values()), rows.weight.codes.nbytes)
        for rows in start(*overrides).optimizer.low_bit.rows
    ]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("adafactor", 0)])
def test_a_rank_has_moments_and_in_stage_3_codes_for_its_own_rows_only(name: str, moments: int, stage: int) -> None:
    columns = (32, 32, 32, 48) * 2  # qkv, o, gate|up, down of two layers
    overrides = (f"optimizer.name={name}", f"deepspeed.zero_optimization.stage={stage}")
    for rank, shards in enumerate(run_distributed(owned, 3, *overrides)):
        for (num_rows, first, last, elements, code_bytes), width in zip(shards, columns, strict=True):
            assert (first, last) == row_bounds(num_rows, 3)[rank]
            held = last - first if stage == 3 else num_rows
            assert code_bytes == held * make_grid("ternary").packed_columns(width)
            if moments:
                assert elements == moments * (last - first) * width
            else:  # one row mean per owned row; per logical matrix one set of column means, and their mean
                assert elements == (last - first) + (width + 1) * {64: 3, 96: 2}.get(num_rows, 1)
    whole = run_distributed(owned, 3, f"optimizer.name={name}")[2]
    assert all((first, last) == (0, num_rows) for num_rows, first, last, _, _ in whole)
