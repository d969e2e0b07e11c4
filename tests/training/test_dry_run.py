"""Ranks of layouts that no machine here has, built by the code that a run executes, without memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.distributed.checkpoint.planner import SavePlan

from dqt_dist.checkpoint.logical_tensor import LogicalSavePlanner
from dqt_dist.config import Config, load_config, process_grid
from dqt_dist.plan import rank_bytes
from dqt_dist.training.dry_run import built, describe_rank
from tests.config.files import ROOT
from tests.config.test_shipped import WORLD_SIZES

# megatron-core says so of an MLP whose layer it builds itself, in a baseline.
pytestmark = pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning")

LARGEST = ROOT / "configs/70b_ternary.json"


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_a_rank_of_each_shipped_config_holds_what_the_plan_says(name: str) -> None:
    """At the largest of its world sizes: the first rank of the last pipeline stage, to the byte."""
    config, world_size = load_config(ROOT / "configs" / f"{name}.json"), max(WORLD_SIZES[name])
    grid = process_grid(config, world_size)
    planned, _ = rank_bytes(config, grid.data)
    with built(config, world_size - grid.tensor * grid.data, world_size) as rank:
        assert rank.low_bit_bytes() == {
            "codes": planned.weights if config.quantization.method == "dqt" else 0,
            "latents": planned.latents,
            "moments": planned.moments + planned.means,
        }
        assert all(parameter.is_meta for parameter in rank.model_chunks.parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        ("deepspeed.zero_optimization.stage=3",),
        ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=4", "parallel.virtual_pipeline=3"),
        ("quantization.embeddings=true", "optimizer.name=adafactor"),
    ],
    ids=str,
)
def test_other_layouts_are_built(overrides: tuple[str, ...]) -> None:
    config = load_config(ROOT / "configs/1b_ternary.json", overrides)
    text = describe_rank(config, 9, 16)
    assert text.startswith("rank            9 = tensor ")
    assert ("blocks 4-5, 12-13, 20-21 of 24" in text) == (config.parallel.virtual_pipeline == 3)


def plans(config: Config, world_size: int) -> Iterator[SavePlan]:
    """What each rank of the first pipeline stage gives to a checkpoint."""
    grid = process_grid(config, world_size)
    for rank in range(grid.tensor * grid.data):
        with built(config, rank, world_size) as found:
            planner = LogicalSavePlanner()
            planner.set_up_planner(found.state, is_coordinator=rank == 0)
            yield planner.create_local_plan()


def test_the_ranks_of_70b_write_every_element_of_a_checkpoint_once() -> None:
    """TP 8 x PP 8 x DP 8, with a block per stage. torch's planner adds up the pieces of each tensor of the stage's 64
    ranks, and refuses plans with a hole (the control: one rank left out) or an overlap."""
    config = load_config(LARGEST, ["model.num_layers=8"])
    every = list(plans(config, 512))
    planner = LogicalSavePlanner()
    planner.set_up_planner({}, is_coordinator=True)
    _, metadata = planner.create_global_plan(every)
    assert {name for name in metadata.state_dict_metadata if name.startswith("codes/")} == {
        f"codes/layers.0.{name}_proj"
        for name in (*(f"self_attn.{part}" for part in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }
    with pytest.raises(ValueError, match="Failed to validate global plan"):
        planner.create_global_plan(every[:30] + every[31:])
