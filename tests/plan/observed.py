"""What a rank of a real run holds and sends, for the tests that compare a plan with it.

    observed(2, "parallel.tensor=2")      # one Observed per rank

A run makes two steps: what it holds is looked at after the first, what it sends is counted in the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from dqt_dist.layers.parameters import low_bit_matrices, parameters
from dqt_dist.parallel.collectives import BYTES_SENT
from dqt_dist.plan.traffic import COUNTED
from dqt_dist.training.cost import storage_bytes
from tests.distributed import run_distributed
from tests.parallel.runs import Run, start
from tests.small import small_config


def stage(number: int) -> str:
    return f"deepspeed.zero_optimization.stage={number}"


TENSOR, PIPELINE, SEQUENCE = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"
BF16 = "quantization.compute=bf16"
FACTORED, EIGHT_BITS = "optimizer.second_moment=factored", ("optimizer.state_bits=8", "model.ffn_hidden_size=64")
# Heads of width 8 and 40 features make rows that 3 ranks divide unevenly.
UNEVEN = "model.ffn_hidden_size=40"
ONE_MICRO_BATCH = "training.global_batch_size=4"
# With two, sums of the first are still in flight when the last backward pass begins, or an interleaved schedule has not
# come to its other chunk.
MORE_MICRO_BATCHES = "training.global_batch_size=12"
EVERY_BACKWARD = "optimizer.gradient_reduction=micro_batch"
FP8 = ("quantization.compute=fp8", "model.ffn_hidden_size=64", "model.hidden_size=64")
_RUNS: list[tuple] = [
    *((2, stage(number), compute) for number in (0, 1, 2, 3) for compute in ("quantization.compute=fp32", BF16)),
    *((3, stage(number), UNEVEN) for number in (0, 1, 3)),
    (3, stage(2), UNEVEN, FACTORED),
    (1, "quantization.embeddings=true", "quantization.bits=4"),
    (2, stage(3), "quantization.embeddings=true", "training.recompute=full"),
    (2, stage(3), "training.recompute=mlp", "training.recompute_layers=1"),
    *((2, stage(number), EVERY_BACKWARD, "optimizer.gradient_dtype=bf16", MORE_MICRO_BATCHES) for number in (0, 1)),
    (2, stage(0), "optimizer.fused_backward=true", "optimizer.max_grad_norm=0", ONE_MICRO_BATCH),
    (2, stage(1), "quantization.method=none"),
    (2, stage(1), "quantization.method=bitnet"),
    (2, stage(1), "quantization.latent_bits=4", "optimizer.gradient_dtype=bf16"),
    (2, stage(2), *EIGHT_BITS),
    (2, stage(2), *EIGHT_BITS, FACTORED),
    (2, stage(3), "quantization.latent_bits=4", FACTORED),
    (2, stage(1), "optimizer.name=adafactor", "optimizer.low_bit_beta1=0.9"),
    (2, stage(0), TENSOR, "optimizer.name=adafactor", "quantization.embeddings=true"),
    (2, TENSOR, FACTORED),
    (2, TENSOR, SEQUENCE, "training.recompute=mlp"),
    (2, TENSOR, SEQUENCE, BF16, "training.recompute=full", "quantization.embeddings=true"),
    (2, TENSOR, SEQUENCE, "quantization.compute=int8"),
    (2, TENSOR, "quantization.activation=none", "model.sub_norm=true"),
    (2, TENSOR, SEQUENCE, "quantization.method=none"),
    (2, TENSOR, "quantization.method=bitnet", "training.recompute=full", "training.recompute_layers=1"),
    (2, TENSOR, SEQUENCE, *FP8),
    (2, TENSOR, SEQUENCE, *FP8, "quantization.weight_gradient=bf16"),
    (2, PIPELINE, "model.sub_norm=true"),
    (4, TENSOR, SEQUENCE, PIPELINE, "parallel.virtual_pipeline=2", "model.num_layers=4", MORE_MICRO_BATCHES),
    (4, TENSOR, stage(1), "quantization.bits=4", "quantization.latent_bits=6", BF16),
    (4, PIPELINE, stage(1), "quantization.bits=8"),
]


def _with_two_micro_batches(world_size: int, *overrides: str) -> tuple:
    """The smallest step that has an earlier micro-batch and a last one, unless the run asks for one."""
    if any(override.startswith("training.global_batch_size") for override in overrides):
        return (world_size, *overrides)
    model_parallel = (2 if TENSOR in overrides else 1) * (2 if PIPELINE in overrides else 1)
    samples = 2 * small_config().training.micro_batch_size * world_size // model_parallel
    return (world_size, *overrides, f"training.global_batch_size={samples}")


CASES = [_with_two_micro_batches(*run) for run in _RUNS]
"""(world size, overrides of the small configuration) of each run."""


@dataclass
class Observed:
    """One rank."""

    held_bytes: dict[str, int]
    """By kind, of the tensors that are alive after a step, and of gradients before and after the last backward."""
    sent_bytes: dict[str, int]
    """By the kinds of dqt_dist/plan/traffic.py, in a step, as far as they can be counted."""


def observed(world_size: int, *overrides: str) -> list[Observed]:
    """One per rank, in rank order."""
    return run_distributed(_observe, world_size, *overrides)


def _observe(rank: int, world_size: int, *overrides: str) -> Observed:
    run = start(*overrides)
    held = _held(run)  # stage 3 learns the order of the layers in this step
    return Observed(held, _sent(run))


# ---- what a rank holds ----


def _held(run: Run) -> dict[str, int]:
    before, after = _gradients_of_a_step(run)
    optimizer = run.optimizer
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
    return found | {"gradients before": before, "gradients after": after}


def _gradients_of_a_step(run: Run) -> tuple[int, int]:
    """Makes the first step. Bytes of gradients when its last backward pass makes the first one, and at their norm."""
    reducer = run.optimizer.reducer
    before, after = [0], [0]
    # Where gradients leave with each micro-batch, `local` is the one that has just been made.
    earlier = "mean" if run.config.optimizer.gradient_reduction == "micro_batch" else "local"

    def of_buffers(name: str) -> int:
        tensors = (getattr(buffer, name) for buffer in reducer.buffers)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    reduced, square_norm = reducer.micro_batch_added, reducer.square_norm

    def at_last_backward(buffer: Any) -> None:
        if not before[0] and buffer.micro_batches == reducer.num_micro_batches > 1:
            before[0] = of_buffers(earlier)
        reduced(buffer)

    def at_norm(buffers: Any) -> torch.Tensor:
        after[0] = of_buffers("mean")
        return square_norm(buffers)

    reducer.micro_batch_added = at_last_backward  # type: ignore[method-assign]
    reducer.square_norm = at_norm  # type: ignore[method-assign]
    run.step(1)
    reducer.micro_batch_added, reducer.square_norm = reduced, square_norm  # type: ignore[method-assign]
    return before[0], after[0]


# ---- what a rank sends ----


def _sent(run: Run) -> dict[str, int]:
    """`pipeline` are Megatron's messages between stages, `means` all-reduces of int64."""
    BYTES_SENT.clear()
    messages, means = [0], [0]
    communicate, all_reduce = P2PCommunicator._communicate, dist.all_reduce

    def counting_communicate(self: P2PCommunicator, **arguments: Any) -> Any:
        sent = (arguments["tensor_send_next"], arguments["tensor_send_prev"])
        messages[0] += sum(tensor.nbytes for tensor in sent if tensor is not None)
        return communicate(self, **arguments)

    def counting_all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype == torch.int64:
            size = dist.get_world_size(kwargs.get("group"))
            means[0] += 2 * tensor.nbytes * (size - 1) // size
        return all_reduce(tensor, *args, **kwargs)

    P2PCommunicator._communicate, dist.all_reduce = counting_communicate, counting_all_reduce
    try:
        run.step(2)
    finally:
        P2PCommunicator._communicate, dist.all_reduce = communicate, all_reduce
    return {kind: BYTES_SENT[kind] for kind in COUNTED} | {"pipeline": messages[0], "means": means[0]}
