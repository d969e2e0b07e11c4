"""CUDA graphs: on a CPU their bookkeeping, on a GPU that a step waits for nothing and that a graph leaves its bits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import waiting_is_an_error
from dqt_dist.config import uses_cuda_graph
from dqt_dist.launch import Launch
from dqt_dist.lowbit.gradient_buffer import GradientState
from dqt_dist.optim.engine import CombinedOptimizer
from dqt_dist.parallel.collectives import BYTES_SENT
from dqt_dist.training.cost import low_bit_bytes
from dqt_dist.training.cuda_graph import EAGER_STEPS, StepGraphs, choose_forward_backward
from dqt_dist.training.step import evaluate, run_schedule, train_step
from tests.distributed import run_distributed
from tests.gpus import Pools, on_gpus
from tests.parallel.runs import Whole, assert_equal, start, whole_state
from tests.small import random_batches, small_config
from tests.training.conftest import Train


def test_without_a_device_the_run_says_what_is_missing(train: Train) -> None:
    result = train("training.cuda_graph=true")
    assert result.returncode == 2
    assert "training.cuda_graph: true needs a CUDA device" in result.stderr


def test_auto_records_on_a_gpu_where_nothing_stands_against_it() -> None:
    assert uses_cuda_graph(small_config("training.cuda_graph=auto", "parallel.tensor=2", "parallel.pipeline=2"))
    assert not uses_cuda_graph(small_config("training.cuda_graph=auto", "deepspeed.zero_optimization.stage=3"))
    on_cpu: Any = SimpleNamespace(device=torch.device("cpu"))
    nothing: Any = None
    eager: Any = choose_forward_backward(nothing, nothing, small_config("training.cuda_graph=auto"), on_cpu)
    assert eager.func is run_schedule


# ---- on a CPU ----


class RecordOnCpu:
    """Stands in for CudaRecord: a replay runs the function again, then puts results where a graph would.

    The addresses of results, the memory that is read, and the state of the buffers are those of a graph.
    """

    def __init__(self, optimizer: CombinedOptimizer) -> None:
        self.reducer = optimizer.reducer

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        result = function()

        def replay() -> None:
            before = BYTES_SENT.copy()
            result.copy_(function())
            BYTES_SENT.clear()
            BYTES_SENT.update(before)  # a graph's collectives run without Python
            for buffer in self.reducer.buffers:
                # After the last part of a step.
                if buffer.state is GradientState.TAKE and buffer.micro_batches == self.reducer.num_micro_batches:
                    assert buffer.recorded is not None
                    buffer.recorded.copy_(buffer.take())

        return result, replay


def stepped(rank: int, world_size: int, recorded: bool, *overrides: str) -> tuple[Whole, list[float], dict, float]:
    """Five steps. Returns the state, losses, bytes sent by kind, and bytes of gradients per low-bit weight."""
    run = start(*overrides)
    forward_backward = run.forward_backward
    if recorded:
        record = RecordOnCpu(run.optimizer)
        forward_backward = StepGraphs(run.model_chunks, run.optimizer, run.config, run.groups, record).run
    BYTES_SENT.clear()
    losses = [run.mean_loss(run.step(number, forward_backward)) for number in range(1, 6)]
    return whole_state(run), losses, dict(BYTES_SENT), low_bit_bytes(run.optimizer.low_bit)["gradient"]


DP_2 = ("training.global_batch_size=16",)  # 4 micro-batches per rank: a first one, two in the middle, a last one


@pytest.mark.parametrize(
    ("ranks", "settings", "width"),
    [
        (1, ["deepspeed.zero_optimization.stage=1", "data.document_masking=true"], 4),
        (1, ["training.global_batch_size=2", "optimizer.gradient_dtype=bf16"], 2),
        (2, ["deepspeed.zero_optimization.stage=0", *DP_2], 2),
        (2, ["deepspeed.zero_optimization.stage=1", "training.global_batch_size=8"], 2),
        (2, ["deepspeed.zero_optimization.stage=2", "optimizer.gradient_dtype=bf16", *DP_2], 1),
        (2, ["deepspeed.zero_optimization.stage=1", "optimizer.gradient_reduction=micro_batch", *DP_2], 2),
        (2, ["parallel.tensor=2", "parallel.sequence=true", "quantization.compute=bf16"], 4),
        (2, ["parallel.pipeline=2"], 4),
        (2, ["parallel.pipeline=2", "model.num_layers=4", "parallel.virtual_pipeline=2", "training.recompute=mlp"], 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_recorded_step_makes_the_same_steps_and_its_bytes_are_counted(
    ranks: int, settings: list[str], width: int
) -> None:
    """The gradients that stay between steps are those of the owned rows: `width` bytes per weight."""
    (wanted, losses, sent, none), (found, again, sent_again, kept) = (
        run_distributed(stepped, ranks, recorded, *settings)[0] for recorded in (False, True)
    )
    assert_equal(found, wanted)
    assert losses == again and len(set(losses)) == len(losses)
    assert sent == sent_again
    assert none == 0 and kept == width


# ---- on GPUs ----

STEPS = EAGER_STEPS + 3
BF16 = ["quantization.compute=bf16", "model.hidden_size=64", "model.ffn_hidden_size=128"]
FP8 = [*BF16, "quantization.compute=fp8", "optimizer.state_bits=8", "optimizer.gradient_dtype=bf16"]
ZERO_1 = ["deepspeed.zero_optimization.stage=1"]
DOCUMENTS = ["data.document_masking=true"]


def states(launch: Launch, overrides: list[str]) -> tuple[list[float], Whole, dict[str, int]]:
    """Losses, the whole state on rank 0 and bytes sent, after some steps with a validation between two of them.

    In the last step, waiting for the device is an error in ZeRO stages 1 and 2.
    """
    run = start(*overrides, "training.deterministic=true", launch=launch)
    forward_backward = run.forward_backward
    losses = []
    BYTES_SENT.clear()
    for step in range(STEPS):
        # Pinned, like the batches of the loader.
        batches = random_batches(run.config, step, run.groups.data.rank(), run.groups.data.size())
        batches = [{name: t.pin_memory() for name, t in batch.items()} for batch in batches]
        no_waiting = step == STEPS - 1 and run.config.zero_stage in (1, 2)
        with waiting_is_an_error() if no_waiting else nullcontext():
            result = train_step(run.engine, run.model_chunks, batches, forward_backward)
        losses.append(run.mean_loss(result))
        if step == EAGER_STEPS:
            losses.append(evaluate(run.model_chunks, iter([batches]), run.config, run.groups))
    sent = dict(BYTES_SENT)
    return losses, whole_state(run), sent


def assert_graph_leaves_the_bits(pools: Pools, world_size: int, overrides: list[str]) -> None:
    eager, recorded = (
        on_gpus(pools, world_size, states, [*overrides, f"training.cuda_graph={graph}"]) for graph in ("false", "true")
    )
    assert eager[0] == recorded[0] and len(set(eager[0])) == STEPS + 1
    assert_equal(recorded[1], eager[1])
    assert recorded[2] == eager[2]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides",
    [
        [*BF16, *ZERO_1, "optimizer.state_bits=8", "optimizer.gradient_dtype=bf16"],
        [*FP8, *ZERO_1],
        [*BF16, *ZERO_1, "quantization.latent_bits=4", "quantization.scale_refit_interval=1"],
        [*BF16, *ZERO_1, "training.global_batch_size=2"],
        [*FP8, *ZERO_1, "training.recompute=full"],
        [*FP8, *ZERO_1, *DOCUMENTS, "training.recompute=full"],
        [*BF16, *ZERO_1, *DOCUMENTS, "training.micro_batch_size=1"],
        [*BF16, *ZERO_1, "quantization.method=none"],
        [*BF16, *ZERO_1, "quantization.method=bitnet"],
    ],
    ids=[
        *("bf16", "fp8", "latents", "one micro-batch", "recompute", "documents, recompute", "documents", "none"),
        "bitnet",
    ],
)
def test_a_step_waits_for_nothing_and_a_graph_leaves_its_bits(gpu_processes: Pools, overrides: list[str]) -> None:
    """Six micro-batches per step, unless a case says otherwise.

    All losses differ, so a batch or an update that a graph does not see would show. Documents begin elsewhere in each
    sample of each step.
    """
    assert_graph_leaves_the_bits(gpu_processes, 1, overrides)


TP_2 = [*ZERO_1, "parallel.tensor=2", "parallel.sequence=true"]
PP_2 = [*ZERO_1, "parallel.pipeline=2", "model.num_layers=4", "training.global_batch_size=8"]


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    "overrides",
    [
        [*FP8, *ZERO_1],
        [*FP8, *ZERO_1, "training.global_batch_size=4"],
        [*BF16, "deepspeed.zero_optimization.stage=2", "quantization.latent_bits=4"],
        [*BF16, *ZERO_1, "quantization.method=none"],
        [*FP8, *TP_2],
        [*BF16, *TP_2],
        [*FP8, *ZERO_1, "parallel.tensor=2", "training.global_batch_size=2"],
        [*BF16, *TP_2, "quantization.method=none"],
        [*FP8, *PP_2],
        [*BF16, *PP_2, "parallel.virtual_pipeline=2"],
        [*BF16, *PP_2, *DOCUMENTS],
        [*BF16, *TP_2, *DOCUMENTS],
    ],
    ids=[
        *("ZeRO 1", "one micro-batch", "ZeRO 2", "none", "TP SP", "TP SP bf16", "TP", "TP none", "PP", "interleaved"),
        *("PP documents", "TP SP documents"),
    ],
)
def test_a_graph_over_two_gpus_leaves_its_bits(gpu_processes: Pools, overrides: list[str]) -> None:
    assert_graph_leaves_the_bits(gpu_processes, 2, overrides)


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize("compute", [BF16, FP8], ids=["bf16", "fp8"])
def test_stages_over_nccl_have_the_same_bits(gpu_processes: Pools, compute: list[str]) -> None:
    """ZeRO 0 to 3, three micro-batches per rank, without the check for waiting: DeepSpeed's stage 0 and 3 wait."""
    losses, wanted, _ = on_gpus(gpu_processes, 2, states, [*compute, "deepspeed.zero_optimization.stage=0"])
    for stage in (1, 2, 3):
        again, found, _ = on_gpus(gpu_processes, 2, states, [*compute, f"deepspeed.zero_optimization.stage={stage}"])
        assert again == losses
        assert_equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize("compute", [BF16, FP8], ids=["bf16", "fp8"])
def test_copies_between_gpus_leave_the_bits(gpu_processes: Pools, compute: list[str]) -> None:
    overrides = [*compute, *TP_2, "training.cuda_graph=true"]
    messages, copies = (
        on_gpus(gpu_processes, 2, states, [*overrides, f"parallel.peer_copies={wanted}"])
        for wanted in ("false", "true")
    )
    assert copies[0] == messages[0]
    assert_equal(copies[1], messages[1])
    assert copies[2] == messages[2]
