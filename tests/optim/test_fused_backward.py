"""optimizer.fused_backward updates matrices inside the backward pass. Only the memory of gradients differs."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from dqt_dist.checkpoint.digest import digest
from dqt_dist.checkpoint.folder import Progress
from dqt_dist.lowbit.gradient_buffer import GradientBuffer
from dqt_dist.training.low_bit_metrics import LowBitMetricsCollector
from dqt_dist.training.step import train_step
from tests.distributed import run_distributed
from tests.parallel.runs import Run, Whole, assert_equal, start, whole_state
from tests.small import random_batches

FUSED = "optimizer.fused_backward=true"
STATE_8 = ("optimizer.state_bits=8", "model.ffn_hidden_size=64")
STEPS = 3
# The learning rate differs at each step, so a wrong step number shows.
SETTINGS = ("optimizer.max_grad_norm=0", "optimizer.schedule=linear", "optimizer.warmup_steps=2")


def begin(world_size: int, *overrides: str) -> Run:
    return start(*SETTINGS, f"training.global_batch_size={2 * world_size}", *overrides)  # one micro-batch


def zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


# ---- the same bits ----


def result(rank: int, world_size: int, *overrides: str) -> tuple[str, list[float], list[float], Tensor]:
    """Digest of the whole state after three steps, losses, norms, and the metrics of the last update."""
    run = begin(world_size, *overrides)
    results = [run.step(number) for number in range(1, STEPS + 1)]
    metrics = LowBitMetricsCollector(run.optimizer.low_bit, run.config, run.groups).collect().per_matrix
    state = digest(whole_state(run).items(), Progress(0, 0, 0)).total
    return state, [run.mean_loss(r) for r in results], [float(r.grad_norm) for r in results], metrics


CASES: list[tuple[Any, ...]] = [
    (1, 0),
    (1, 0, *STATE_8),
    (2, 0, *STATE_8),
    (2, 1, "quantization.embeddings=true"),
    (2, 2, *STATE_8),
    (2, 1, "quantization.latent_bits=4", "quantization.scale_refit_interval=2"),
    (2, 3, *STATE_8, "training.recompute=full"),
    (3, 3, "quantization.embeddings=true", "quantization.compute=bf16", "optimizer.gradient_dtype=bf16"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_leaves_the_bits_of_a_step_that_updates_at_the_end(case: tuple[Any, ...]) -> None:
    """Codes, moments, parameters, losses, norms and counts are equal.

    The test would fail if a matrix changed before its own dx was computed, or in stage 3 before all ranks have used the
    gathered codes, or with the rate of the step before (asserted below).
    """
    ranks, stage, *overrides = case
    state, losses, norms, metrics = run_distributed(result, ranks, zero(stage), *overrides, FUSED)[0]
    wanted_state, wanted_losses, wanted_norms, wanted_metrics = run_distributed(result, ranks, zero(stage), *overrides)[
        0
    ]
    assert (losses, norms) == (wanted_losses, wanted_norms)
    assert torch.equal(metrics, wanted_metrics) and metrics[:, 0].min() > 0
    assert state == wanted_state


def test_another_rate_is_seen() -> None:
    """Negative control: a step number that is too small or too large by one gives another state."""
    one, other = (run_distributed(result, 1, zero(0), FUSED, f"optimizer.warmup_steps={steps}")[0] for steps in (2, 3))
    assert one[0] != other[0]


# ---- memory ----


def most_gradients(rank: int, world_size: int, *overrides: str) -> tuple[int, int]:
    """Elements of all low-bit matrices, and elements of large float memory in a step, without moments.

    The float memory is measured each time a gradient has just been made. Memory counts when it is as large as the
    smallest matrix.
    """
    model = ("model.num_layers=4", "model.hidden_size=64", "model.ffn_hidden_size=64", "model.seq_length=4")
    run = begin(world_size, *model, "model.vocab_size=16", *overrides)
    run.step(1)
    rows = run.optimizer.low_bit.rows
    smallest = min(r.weight.numel for r in rows) // world_size
    moments = {tensor.untyped_storage().data_ptr() for r in rows for tensor in r.state.values()}
    gc.collect()
    before = {address for address, _ in float_storages(smallest)}
    most = 0

    low_bit, reducer = {id(r.gradient) for r in rows}, run.optimizer.reducer
    micro_batch_added = reducer.micro_batch_added

    def watched(buffer: GradientBuffer) -> None:
        nonlocal most
        if id(buffer) in low_bit:
            most = max(most, sum(n for at, n in float_storages(smallest) if at not in before and at not in moments))
        micro_batch_added(buffer)

    reducer.micro_batch_added = watched  # type: ignore[method-assign]
    run.step(2)
    return sum(r.weight.numel for r in rows), most


def float_storages(smallest: int) -> set[tuple[int, int]]:
    """(address, elements) of float memory of at least `smallest` elements."""
    alive = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.is_floating_point()]
    found = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes() // t.element_size()) for t in alive}
    return {(address, numel) for address, numel in found if numel >= smallest}


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 0), (2, 2)])
def test_gradients_of_a_few_matrices_are_alive_at_once(ranks: int, stage: int) -> None:
    """There are 16 matrices in four layers. The largest, gate|up, is a third of a layer.

    On one rank only the gradient that was just made is alive. With exchanges three more are in flight, each twice.
    Control: updated at the end of the step, all gradients of the owned rows are alive.
    """
    weights, most = run_distributed(most_gradients, ranks, zero(stage), *STATE_8[:1], FUSED)[0]
    largest = 2 * 64 * 64
    assert most <= (largest if ranks == 1 else 7 * largest)
    weights, at_the_end = run_distributed(most_gradients, ranks, zero(0), *STATE_8[:1])[0]
    assert most < weights / ranks <= at_the_end


# ---- gradients that are not finite ----


def poisoned(rank: int, world_size: int, *overrides: str) -> tuple[Whole, Whole, Whole, float]:
    """States before and after a step whose loss is not finite, and after the next; the gradient norm."""
    run = begin(world_size, *overrides)
    run.step(1)
    before = {name: tensor.clone() for name, tensor in whole_state(run).items()}
    batches = random_batches(run.config, 2, run.groups.data.rank(), run.groups.data.size())
    batches[0]["loss_mask"] *= float("inf")  # inf / inf
    norm = float(train_step(run.engine, run.model_chunks, batches, run.forward_backward).grad_norm)
    after = {name: tensor.clone() for name, tensor in whole_state(run).items()}
    run.step(3)
    return before, after, whole_state(run), norm


@pytest.mark.parametrize("overrides", [(), STATE_8], ids=str)
def test_a_gradient_that_is_not_finite_counts_as_zero(overrides: tuple[str, ...]) -> None:
    """Nothing becomes nan.

    Low-bit moments decay, ordinary parameters do not change, the norm is not finite, and the run goes on.
    """
    before, after, later, norm = run_distributed(poisoned, 1, *overrides, FUSED)[0]
    assert not torch.tensor(norm).isfinite()
    assert_equal(after, before, "parameter/")
    assert all(tensor.isfinite().all() for tensor in [*after.values(), *later.values()])
    if not overrides:
        for name in (name for name in before if name.startswith("low_bit.exp_avg_sq/")):
            assert torch.equal(after[name], before[name] * 0.95)
    changed = [name for name in after if not torch.equal(later[name], after[name])]
    assert any(name.startswith("codes/") for name in changed) and "parameter/embed_tokens" in changed
