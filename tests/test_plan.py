"""The plan's bytes of memory against the tensors that a rank really holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dqt_dist.config import Config
from dqt_dist.layers.parameters import low_bit_matrices, parameters
from dqt_dist.plan import RankBytes, rank_bytes
from dqt_dist.plan.activations import activation_bytes
from dqt_dist.training.cost import storage_bytes
from tests.distributed import run_distributed
from tests.parallel.runs import start
from tests.small import small_config

# ---- between steps ----


def held(rank: int, world_size: int, *overrides: str) -> dict[str, int]:
    """The bytes by kind of the tensors that are alive after a step, and of gradients before and after the last
    backward pass."""
    run = start(*overrides)
    optimizer = run.optimizer
    before, after = [0], [0]

    def of_buffers(name: str) -> int:
        buffers = optimizer.reducer.buffers
        return sum(t.nbytes for t in (getattr(buffer, name) for buffer in buffers) if t is not None)

    reduced, square_norm = optimizer.reducer.micro_batch_added, optimizer.reducer.square_norm

    def at_last_backward(buffer: Any) -> None:
        if not before[0] and buffer.micro_batches == optimizer.reducer.num_micro_batches > 1:
            before[0] = of_buffers("local") + of_buffers("mean")
        reduced(buffer)

    def at_norm(buffers: Any) -> torch.Tensor:
        after[0] = of_buffers("mean")
        return square_norm(buffers)

    optimizer.reducer.micro_batch_added = at_last_backward  # type: ignore[method-assign]
    optimizer.reducer.square_norm = at_norm  # type: ignore[method-assign]
    run.step(1)
    weights = low_bit_matrices(run.model_chunks)
    masters = list({id(s.master): s.master for s in optimizer.shards if s.master is not None}.values())
    tensors = [p.tensor for p in parameters(run.model_chunks)]
    in_stage_3: list[Any] = [t for t in tensors if hasattr(t, "ds_tensor")]
    states = [optimizer.high_precision.torch_optimizer.state[master] for master in masters]
    compute_bytes = 2 if run.config.quantization.dtype == "bf16" else 4
    kinds = {
        "codes": [weight.codes for weight in weights],
        "scales": [
            t
            for w in weights
            for t in (w.scale, w.row_matrix, w.latent_scale, *(values for _, values in w._of_rows.values()))
            if t is not None
        ],
        "low-bit moments": [t for rows in optimizer.low_bit.rows for name, t in rows.state.items() if name != "latent"],
        "latents": [t for rows in optimizer.low_bit.rows for name, t in rows.state.items() if name == "latent"],
        # Memory that masters share with the weights of a product counts as weights.
        "other weights": [t for t in tensors if not in_stage_3],
        "masters": [m for m in masters if not any(m is t for t in tensors)],
        "moments": [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")],
    }
    found = {name: storage_bytes(some) for name, some in kinds.items()}
    if in_stage_3:
        whole = sum(compute_bytes * t.ds_numel for t in in_stage_3 if t.ds_persist)
        found["other weights"] = whole + sum(t.ds_tensor.numel() * compute_bytes for t in in_stage_3)
        if compute_bytes == 4:
            found["masters"] = 0
    return found | {"gradients before": before[0], "gradients after": after[0]}


def planned(low_bit: RankBytes, other: RankBytes) -> dict[str, int]:
    """The same kinds, from the plan."""
    return {
        "codes": low_bit.weights,
        "scales": low_bit.scales,
        "low-bit moments": low_bit.moments,
        "latents": low_bit.latents,
        "other weights": other.weights,
        "masters": other.masters,
        "moments": other.moments,
        "gradients before": low_bit.gradients_before + other.gradients_before,
        "gradients after": low_bit.gradients_after + other.gradients_after,
    }


CASES = [
    *((2, f"deepspeed.zero_optimization.stage={stage}", f"quantization.compute={compute}")
      for stage in range(4) for compute in ("fp32", "bf16")),
    *((3, f"deepspeed.zero_optimization.stage={stage}", "training.global_batch_size=6", "model.ffn_hidden_size=40")
      for stage in (0, 1, 3)),
    (4, "parallel.tensor=2", "deepspeed.zero_optimization.stage=1", "quantization.bits=8"),
    (4, "parallel.pipeline=2", "deepspeed.zero_optimization.stage=1", "model.sub_norm=true"),
    (1, "quantization.embeddings=true", "quantization.bits=4"),
    (2, "quantization.latent_bits=4", "deepspeed.zero_optimization.stage=1"),
    (2, "optimizer.state_bits=8", "model.ffn_hidden_size=64", "deepspeed.zero_optimization.stage=2"),
    (2, "optimizer.second_moment=factored", "optimizer.state_bits=8", "model.ffn_hidden_size=64",
     "deepspeed.zero_optimization.stage=2"),
    (2, "optimizer.second_moment=factored", "parallel.tensor=2"),
    (2, "optimizer.name=adafactor", "parallel.tensor=2", "quantization.embeddings=true"),
    (2, "optimizer.name=adafactor", "optimizer.beta1=0.9", "deepspeed.zero_optimization.stage=1"),
    (2, "optimizer.gradient_dtype=bf16", "deepspeed.zero_optimization.stage=1"),
    (2, "quantization.method=bitnet", "deepspeed.zero_optimization.stage=1"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_is_what_a_rank_holds(case: tuple) -> None:
    """Every kind, to the byte, on the first rank of the last pipeline stage."""
    world_size, *overrides = case
    found = run_distributed(held, world_size, *overrides)
    config = small_config(*overrides)
    ranks_per_stage = world_size // config.parallel.pipeline
    data = ranks_per_stage // config.parallel.tensor
    assert planned(*rank_bytes(config, data)) == found[world_size - ranks_per_stage]


# ---- what is kept for the backward ----


def saved_for_backward(rank: int, world_size: int, *overrides: str) -> int:
    """Bytes of the tensors, but for weights, that the forward of one micro-batch keeps."""
    run = start(*overrides)
    weights = {t.untyped_storage().data_ptr() for t in (*run.model_chunks.parameters(), *run.model_chunks.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        in_backward = torch._C._current_graph_task_id() != -1  # a block that is computed again
        if not in_backward and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run.step(1)
    return storage_bytes(list(kept.values()))


TENSOR, SEQUENCE, BF16 = "parallel.tensor=2", "parallel.sequence=true", "quantization.compute=bf16"
MLP, FULL = "training.recompute=mlp", "training.recompute=full"
ACTIVATIONS = [
    *((1, recompute) for recompute in ("training.recompute=none", MLP, FULL)),
    *((1, BF16, "quantization.method=none", *recompute) for recompute in ((), (MLP,), (FULL,))),
    (1, BF16, "model.num_query_groups=4"),
    (1, MLP, "training.recompute_layers=1"),
    (1, "quantization.method=none"),
    *((1, BF16, "quantization.method=bitnet", *recompute) for recompute in ((), (MLP,))),
    *((1, BF16, "model.sub_norm=true", *recompute) for recompute in ((), (MLP,))),
    (1, "quantization.embeddings=true", "quantization.activation=none"),
    (2, TENSOR),
    (2, TENSOR, SEQUENCE, MLP),
    (2, TENSOR, SEQUENCE, BF16, "quantization.method=none"),
]


@pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
def test_activations_are_those_that_a_step_saves(case: tuple) -> None:
    """Within 5 %: a few scalars, and angles of the rotary embedding that a block computed again does not save."""
    world_size, *overrides = case
    more = [*overrides, "training.global_batch_size=2"]
    found = run_distributed(saved_for_backward, world_size, *more)[0]
    estimate = activation_bytes(small_config(*more), 1, on_gpu=False)
    assert estimate.kept + estimate.head == pytest.approx(found, rel=0.05)


def test_activations_of_blocks_that_are_not_computed_again() -> None:
    """`recompute_layers` of the blocks are; a pipeline's first stage holds those of two micro-batches."""

    def kept(*overrides: str, data: int = 1, stage: int | None = None) -> int:
        config: Config = small_config("training.global_batch_size=8", *overrides)
        return activation_bytes(config, data, stage).kept

    none, one, both = (
        kept(*overrides)
        for overrides in ((), ("training.recompute=full", "training.recompute_layers=1"), ("training.recompute=full",))
    )
    assert none - one == one - both > 0
    first, last = (kept("parallel.pipeline=2", stage=stage) for stage in (0, 1))
    assert first > 2 * last * 0.9
