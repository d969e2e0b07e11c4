"""The refit of all scales at once: what each matrix gets, where it is written, and how much is launched for it.

That refitted scales have the same bits in every layout and ZeRO stage: tests/parallel/test_zero.py and
tests/checkpoint/test_layouts.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dqt_dist.lowbit.latent import codes_per_latent, refit_scale, scale_multiple
from dqt_dist.lowbit.packing import unpack
from tests.distributed import run_distributed
from tests.parallel.runs import Run, start

LATENTS = ("quantization.latent_bits=8",)
FIRST_STEP, NEXT_STEP = 1, 2


class Launched(TorchDispatchMode):
    """Names of the operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def run_with_a_step(*overrides: str) -> Run:
    run = start(*LATENTS, *overrides)
    run.step(FIRST_STEP)
    return run


def launched(rank: int, world_size: int, *overrides: str) -> list[str]:
    """Operations of the second refit after a step; the first one finds what is kept afterwards."""
    refit, clip = run_with_a_step(*overrides).optimizer.low_bit.scale_refit, torch.tensor(1.0)
    refit.begin_step(NEXT_STEP)
    refit.write(clip)
    with Launched() as found:
        refit.begin_step(NEXT_STEP)
        refit.write(clip)
    return found.names


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_refit_launches_does_not_grow_with_the_model(ranks: int) -> None:
    few, many = (run_distributed(launched, ranks, f"model.num_layers={layers}")[0] for layers in (2, 4))
    assert few == many
    assert few.count("aten._foreach_copy_.default") == 1 and len(few) < 40


def check_what_is_written(rank: int, world_size: int) -> None:
    low_bit = run_with_a_step().optimizer.low_bit
    for index, rows in enumerate(low_bit.rows):
        assert rows.weight.latent_grid is not None and rows.weight.layout is not None
        latents = unpack(rows.state["latent"], rows.weight.latent_grid, rows.weight.columns).abs().sum(1).long()
        sums = torch.zeros(len(rows.weight.scale), dtype=torch.int64).index_add_(0, rows.row_matrix, latents)
        numel = torch.tensor([matrix.rows * matrix.columns for matrix in rows.weight.layout.matrices])
        multiple = scale_multiple(rows.weight.grid, low_bit.config.quantization.scale_sigmas)
        wanted = refit_scale(sums, numel, rows.weight.latent_scale, rows.weight.scale, multiple)
        assert not torch.equal(wanted, rows.weight.scale)
        before = rows.weight.scale_tensors()
        low_bit.scale_refit.begin_step(NEXT_STEP)
        low_bit.scale_refit.write_one(index)
        after = rows.weight.scale_tensors()
        # CUDA graphs read the values of rows where these have always been.
        assert [tensor.data_ptr() for tensor in before] == [tensor.data_ptr() for tensor in after]
        ratio = codes_per_latent(wanted, rows.weight.latent_scale, low_bit.config.quantization.latent_threshold)
        of_rows = rows.weight.row_matrix.long()
        for tensor, expected in zip(after, (wanted, wanted[of_rows], ratio[of_rows]), strict=True):
            assert torch.equal(tensor, expected)


def test_each_matrix_gets_the_scale_of_its_own_latents_where_the_old_one_was() -> None:
    run_distributed(check_what_is_written, 1)


def scales_of_steps(rank: int, world_size: int, interval: int) -> list[list[float]]:
    run = start("quantization.latent_bits=8", f"quantization.scale_refit_interval={interval}")
    found = []
    for step in range(1, 5):
        run.step(step)
        found.append(torch.cat([rows.weight.scale for rows in run.optimizer.low_bit.rows]).tolist())
    return found


def test_scales_change_in_every_interval_th_step_only() -> None:
    first, second, third, fourth = run_distributed(scales_of_steps, 1, 2)[0]
    assert first != second == third != fourth
