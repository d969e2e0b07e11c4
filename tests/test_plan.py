"""The plan's bytes against the tensors that a rank really holds, and against what a real step counts as sent."""

from __future__ import annotations

import pytest
import torch

from dqt_dist.config import Config, process_grid
from dqt_dist.plan import RankBytes, rank_bytes
from dqt_dist.plan.activations import activation_bytes
from dqt_dist.plan.traffic import bytes_sent
from dqt_dist.training.cost import storage_bytes
from tests.distributed import run_distributed
from tests.parallel.runs import start
from tests.plan.observed import BF16, CASES, SEQUENCE, TENSOR, observed
from tests.small import small_config

# ---- between steps, and on the wire ----


def planned(low_bit: RankBytes, other: RankBytes) -> dict[str, int]:
    """The same kinds, from the plan."""
    return {
        "codes": low_bit.weights,
        "scales": low_bit.scales,
        "low-bit moments": low_bit.moments + low_bit.means,
        "latents": low_bit.latents,
        "other weights": other.weights,
        "masters": other.masters,
        "moments": other.moments,
        "gradients before": low_bit.gradients_before + other.gradients_before,
        "gradients after": low_bit.gradients_after + other.gradients_after,
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_is_what_a_rank_holds_and_sends(case: tuple) -> None:
    """Every kind, to the byte: held on the first rank of the last pipeline stage, sent also on that of the first. Ranks
    count along the tensor axis first."""
    world_size, *overrides = case
    found = observed(*case)
    config = small_config(*overrides)
    grid = process_grid(config, world_size)
    last = world_size - grid.tensor * grid.data
    assert planned(*rank_bytes(config, grid.data)) == found[last].held_bytes
    for stage, rank in ((0, 0), (grid.pipeline - 1, last)):
        sent = bytes_sent(config, grid, stage)
        assert {kind: sent[kind] for kind in found[rank].sent_bytes} == found[rank].sent_bytes
    assert any(found[0].sent_bytes.values()) == (world_size > 1)


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


MLP, FULL = "training.recompute=mlp", "training.recompute=full"
ACTIVATIONS = [
    *((1, recompute) for recompute in ("training.recompute=none", MLP, FULL)),
    *((1, BF16, "quantization.method=none", *recompute) for recompute in ((), (MLP,), (FULL,))),
    (1, BF16, "model.num_query_groups=4"),
    *((1, "data.document_masking=true", *recompute) for recompute in ((), (BF16,), (FULL,))),
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
