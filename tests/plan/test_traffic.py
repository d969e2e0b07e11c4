"""The bytes of dqt_dist/plan/traffic.py against what real steps count, and against Megatron's messages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dqt_dist.config import process_grid
from dqt_dist.parallel.collectives import BYTES_SENT
from dqt_dist.plan.traffic import COUNTED, bytes_sent
from tests.distributed import run_distributed
from tests.parallel.runs import start
from tests.small import small_config


def counted(rank: int, world_size: int, *overrides: str) -> dict[str, int]:
    """What this rank sends in the second step; `pipeline` are Megatron's messages between stages."""
    run = start(*overrides)
    run.step(1)  # stage 3 learns the order of the layers
    BYTES_SENT.clear()
    messages: list[int] = []
    isend = dist.isend

    def counting(tensor: torch.Tensor, *args, **kwargs):
        messages.append(tensor.nbytes)
        return isend(tensor, *args, **kwargs)

    dist.isend = torch.distributed.isend = counting
    try:
        run.step(2)
    finally:
        dist.isend = torch.distributed.isend = isend
    return {**{kind: BYTES_SENT[kind] for kind in COUNTED}, "pipeline": sum(messages)}


def stage(number: int) -> str:
    return f"deepspeed.zero_optimization.stage={number}"


TENSOR, PIPELINE, SEQUENCE = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"
# Heads of width 8 and 40 features make rows that 3 ranks divide unevenly.
UNEVEN = ("model.ffn_hidden_size=40", "training.global_batch_size=6")
FP8 = ("quantization.compute=fp8", "model.ffn_hidden_size=64", "model.hidden_size=64")
CASES = [
    *((2, stage(number), "training.global_batch_size=8") for number in (2, 3)),
    *((3, stage(number), *UNEVEN) for number in (0, 1, 3)),
    (2, stage(3), "quantization.embeddings=true", "training.recompute=full"),
    (2, stage(3), "training.recompute=mlp", "training.recompute_layers=1"),
    (2, stage(1), "optimizer.gradient_reduction=micro_batch", "optimizer.gradient_dtype=bf16"),
    (2, stage(0), "optimizer.fused_backward=true", "optimizer.max_grad_norm=0", "training.global_batch_size=4"),
    (2, stage(1), "quantization.method=none"),
    (2, TENSOR),
    (2, TENSOR, SEQUENCE, "training.recompute=mlp"),
    (2, TENSOR, SEQUENCE, "quantization.compute=bf16", "training.recompute=full", "quantization.embeddings=true"),
    (2, TENSOR, SEQUENCE, "quantization.compute=int8"),
    (2, TENSOR, "quantization.activation=none", "model.sub_norm=true"),
    (2, TENSOR, SEQUENCE, "quantization.method=none"),
    (2, TENSOR, "quantization.method=bitnet", "training.recompute=full", "training.recompute_layers=1"),
    (2, TENSOR, SEQUENCE, *FP8),
    (2, TENSOR, SEQUENCE, *FP8, "quantization.weight_gradient=bf16"),
    (4, TENSOR, SEQUENCE, PIPELINE, "parallel.virtual_pipeline=2", "model.num_layers=4"),
    (4, TENSOR, stage(1), "quantization.bits=4", "quantization.compute=bf16"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bytes_planned_are_the_bytes_counted(case: tuple) -> None:
    """Equal for the first and the last pipeline stage. Ranks count along the tensor axis first."""
    world_size, *overrides = case
    found = run_distributed(counted, world_size, *overrides)
    config = small_config(*overrides)
    grid = process_grid(config, world_size)
    for number in {0, grid.pipeline - 1}:
        planned = bytes_sent(config, grid, number)
        rank = number * grid.tensor * grid.data
        assert {kind: planned[kind] for kind in found[rank]} == found[rank]
    assert any(found[0].values())
