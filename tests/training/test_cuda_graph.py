"""On a GPU: a step does not wait for the device, and a CUDA graph gives the same bits as a step without one."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dqt_dist.config import uses_cuda_graph
from dqt_dist.training.cost import low_bit_bytes
from dqt_dist.training.cuda_graph import EAGER_STEPS, choose_forward_backward
from dqt_dist.training.step import run_schedule
from tests.distributed import run_distributed
from tests.parallel.runs import Whole, assert_equal, start, whole_state
from tests.small import random_batches, small_config
from tests.training.conftest import Train


def test_without_a_device_the_run_says_what_is_missing(train: Train) -> None:
    result = train("training.cuda_graph=true")
    assert result.returncode == 2
    assert "training.cuda_graph: true needs a CUDA device" in result.stderr


def test_auto_records_on_a_gpu_where_nothing_stands_against_it() -> None:
    assert uses_cuda_graph(small_config("training.cuda_graph=auto"))
    assert not uses_cuda_graph(small_config("training.cuda_graph=auto", "training.recompute=full"))
    assert not uses_cuda_graph(small_config("training.cuda_graph=auto", "parallel.tensor=2"))
    on_cpu: Any = SimpleNamespace(device=torch.device("cpu"))
    nothing: Any = None
    eager: Any = choose_forward_backward(nothing, nothing, small_config("training.cuda_graph=auto"), on_cpu)
    assert eager.func is run_schedule


def stepped(rank: int, world_size: int, kept: bool, *overrides: str) -> tuple[Whole, float]:
    """Three steps. Returns the state, and the bytes of gradients per low-bit weight between steps.

    With `kept` the sums of gradients keep their addresses from step to step, as the sums that a graph writes do.
    """
    # "auto" makes no graph on a CPU, but gradients then wait for the end of the step, as they do with a graph.
    run = start(*overrides, *(["training.cuda_graph=auto"] if kept else []))
    for number in (1, 2, 3):
        if not kept:
            run.step(number)
            continue
        batches = random_batches(run.config, number, run.groups.data.rank(), world_size)
        run.optimizer.begin_step()
        run_schedule(run.model_chunks, batches, run.config, run.groups, forward_only=False)
        for buffer in run.optimizer.reducer.buffers:
            if buffer.recorded is None:
                num_micro_batches = buffer.micro_batches
                buffer.record()
            else:
                assert buffer.local is not None
                buffer.recorded.copy_(buffer.local)
            buffer.replayed(num_micro_batches)
        run.engine.step()
    return whole_state(run), low_bit_bytes(run.optimizer.low_bit)["gradient"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_that_stay_where_they_are_give_the_same_steps_and_are_counted(
    ranks: int, stage: int, dtype: str
) -> None:
    settings = (f"deepspeed.zero_optimization.stage={stage}", f"optimizer.gradient_dtype={dtype}")
    (wanted, none), (found, width) = (run_distributed(stepped, ranks, kept, *settings)[0] for kept in (False, True))
    assert_equal(found, wanted)
    assert none == 0 and width == {"fp32": 4, "bf16": 2}[dtype]


def states(overrides: list[str]) -> list[Tensor]:
    """Losses, codes, moments and parameters, on the host, after some steps with a validation between two of them.

    In the last step, waiting for the device is an error.
    """
    from benchmarks.common import waiting_is_an_error
    from dqt_dist.launch import discover, export
    from dqt_dist.layers.build import build_model
    from dqt_dist.optim.engine import build_engine
    from dqt_dist.parallel.groups import finalize, initialize
    from dqt_dist.training.step import evaluate, train_step

    config = small_config(*overrides, "training.deterministic=true")
    launch = discover()
    export(launch)
    groups = initialize(config, launch)
    model_chunks = build_model(config, groups)
    engine = build_engine(model_chunks, config, groups)
    forward_backward = choose_forward_backward(model_chunks, engine.optimizer, config, groups)
    losses = []
    for step in range(EAGER_STEPS + 3):
        # Pinned, like the batches of the loader.
        batches = [{name: t.pin_memory() for name, t in batch.items()} for batch in random_batches(config, step, 0, 1)]
        with waiting_is_an_error() if step == EAGER_STEPS + 2 else nullcontext():
            losses.append(train_step(engine, model_chunks, batches, forward_backward).loss)
        if step == EAGER_STEPS:
            losses.append(torch.tensor(evaluate(model_chunks, iter([batches]), config, groups)))
    kept = [tensor for row in engine.optimizer.low_bit.rows for tensor in (row.weight.codes, *row.state.values())]
    found = [tensor.detach().cpu() for tensor in (*losses, *kept, *model_chunks.parameters())]
    finalize()
    return found


BF16 = ["quantization.compute=bf16", "model.hidden_size=64", "model.ffn_hidden_size=96"]
ZERO_1 = ["deepspeed.zero_optimization.stage=1"]
RUNS = [
    [*BF16, *ZERO_1, "optimizer.state_bits=8", "optimizer.gradient_dtype=bf16"],
    [*BF16, "quantization.compute=fp8", *ZERO_1, "optimizer.state_bits=8", "optimizer.gradient_dtype=bf16"],
    [*BF16, *ZERO_1, "quantization.latent_bits=4", "quantization.scale_refit_interval=1"],
    [*BF16, *ZERO_1, "training.global_batch_size=2"],
    [*BF16, *ZERO_1, "quantization.method=none"],
    [*BF16, *ZERO_1, "quantization.method=bitnet"],
]


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", RUNS, ids=["bf16", "fp8", "latents", "one micro-batch", "none", "bitnet"])
def test_a_step_waits_for_nothing_and_a_graph_leaves_its_bits(overrides: list[str]) -> None:
    """Six micro-batches per step, unless a case says otherwise.

    All losses differ, so a batch or an update that a graph does not see would show.
    """
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        runs = [processes.submit(states, [*overrides, f"training.cuda_graph={graph}"]) for graph in ("false", "true")]
        eager, recorded = (run.result(timeout=120) for run in runs)
    assert len(eager) == len(recorded) > 10
    assert len({float(loss) for loss in recorded[:6]}) == 6
    different = [index for index, (a, b) in enumerate(zip(eager, recorded, strict=True)) if not torch.equal(a, b)]
    assert not different
