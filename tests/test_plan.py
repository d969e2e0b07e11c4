"""The plan of --dry-run against the tensors that a rank really holds."""

from __future__ import annotations

import pytest

from dqt_dist.layers.parameters import low_bit_matrices
from dqt_dist.plan import RankBytes, rank_bytes
from dqt_dist.training.cost import storage_bytes
from tests.distributed import run_distributed
from tests.parallel.runs import start

# DeepSpeed pads each of its flat partitions to a multiple of a few elements.
PADDING_BYTES = 512


def held(rank: int, world_size: int, *overrides: str) -> tuple[RankBytes, RankBytes, dict[str, int]]:
    """The plan, and the bytes of the tensors that are alive after a step."""
    run = start(*overrides)
    run.step(1)
    optimizer = run.optimizer
    masters = list({id(s.master): s.master for s in optimizer.shards if s.master is not None}.values())
    parameters = {id(s.parameter.tensor) for s in optimizer.shards}
    states = [optimizer.high_precision.torch_optimizer.state[master] for master in masters]
    tensors = {
        "codes": [weight.codes for weight in low_bit_matrices(run.model_chunks)],
        "low-bit moments": [t for rows in optimizer.low_bit.rows for name, t in rows.state.items() if name != "latent"],
        "latents": [t for rows in optimizer.low_bit.rows for name, t in rows.state.items() if name == "latent"],
        "masters": [master for master in masters if id(master) not in parameters],
        "moments": [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")],
    }
    plan = rank_bytes(run.config, run.groups.data.size())
    return *plan, {name: storage_bytes(some) for name, some in tensors.items()}


CASES = [
    *((2, f"deepspeed.zero_optimization.stage={stage}", f"quantization.compute={compute}")
      for stage in range(4) for compute in ("fp32", "bf16")),
    (4, "parallel.tensor=2", "deepspeed.zero_optimization.stage=1", "quantization.bits=8"),
    (1, "quantization.embeddings=true", "quantization.bits=4"),
    (2, "quantization.latent_bits=4", "deepspeed.zero_optimization.stage=1"),
    (2, "optimizer.state_bits=8", "model.ffn_hidden_size=64", "deepspeed.zero_optimization.stage=2"),
    (2, "optimizer.second_moment=factored", "optimizer.state_bits=8", "model.ffn_hidden_size=64",
     "deepspeed.zero_optimization.stage=2"),
    (2, "optimizer.second_moment=factored", "parallel.tensor=2"),
    (2, "optimizer.name=adafactor", "parallel.tensor=2", "quantization.embeddings=true"),
    (2, "optimizer.name=adafactor", "optimizer.beta1=0.9", "deepspeed.zero_optimization.stage=1"),
    (2, "quantization.method=bitnet", "deepspeed.zero_optimization.stage=1"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_is_what_a_rank_holds(case: tuple) -> None:
    world_size, *overrides = case
    low_bit, others, found = run_distributed(held, world_size, *overrides)[0]
    assert (found["codes"], found["low-bit moments"]) == (low_bit.weights, low_bit.moments)
    assert found["latents"] == low_bit.latents
    in_stage_3 = "deepspeed.zero_optimization.stage=3" in overrides and "quantization.compute=fp32" in overrides
    if not in_stage_3:  # the parameters are their own masters
        assert others.masters <= found["masters"] <= others.masters + PADDING_BYTES
    assert others.moments <= found["moments"] <= others.moments + PADDING_BYTES
