"""A suspicious step is executed again: a bit flipped on one rank names the rank, and without a flip it is the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from dqt_dist.errors import RunError
from dqt_dist.lowbit.gradient_buffer import GradientBuffer, checksum
from dqt_dist.training.replay import Replay, fault
from dqt_dist.training.step import train_step
from tests.distributed import run_distributed
from tests.parallel.runs import Run, assert_equal, start, whole_state
from tests.small import random_batches

LEARNED_STEPS = 6
SETTINGS = ("training.spike_deviations=3", "training.spike_window=4", "training.steps=20")
MATRIX = "layers.1.self_attn.o_proj"
LOW_BIT, HIGH_BIT = 0, 30
"""Of an fp32 number: the last of the mantissa, and the highest of the exponent, which makes 0.001 about 1e35."""


# ---- faults that a test makes ----


@contextmanager
def flipped_once(
    monkeypatch: pytest.MonkeyPatch, method: str, bit: int, flipped: Callable[..., torch.Tensor]
) -> Iterator[None]:
    """Flips `bit` of one element the next time that `method` of the buffer of MATRIX is called. `flipped` gives the
    memory, fp32, from the arguments of the call."""
    call, left = getattr(GradientBuffer, method), [MATRIX]

    def flip_and_go_on(buffer: GradientBuffer, *arguments: torch.Tensor) -> torch.Tensor | None:
        if buffer.name in left:
            left.remove(buffer.name)
            flipped(buffer, *arguments).view(-1).view(torch.int32)[7] ^= 1 << bit
        return call(buffer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(GradientBuffer, method, flip_and_go_on)
        yield
    assert not left


def gradient_flipped_once(monkeypatch: pytest.MonkeyPatch, bit: int):
    """In the gradient that this rank sends next."""

    def local(buffer: GradientBuffer) -> torch.Tensor:
        assert buffer.local is not None
        return buffer.local

    return flipped_once(monkeypatch, "send", bit, local)


def transfer_flipped_once(monkeypatch: pytest.MonkeyPatch):
    """In the next mean that this rank receives."""
    return flipped_once(monkeypatch, "receive", LOW_BIT, lambda buffer, mean: mean)


@contextmanager
def nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield


def low_bit_flipped(monkeypatch: pytest.MonkeyPatch):
    return gradient_flipped_once(monkeypatch, LOW_BIT)


def high_bit_flipped(monkeypatch: pytest.MonkeyPatch):
    return gradient_flipped_once(monkeypatch, HIGH_BIT)


Fault = Callable[[pytest.MonkeyPatch], object]


# ---- steps ----


def started(*overrides: str) -> tuple[Run, Replay]:
    run = start(*SETTINGS, *overrides)
    return run, Replay(run.forward_backward, run.model_chunks, run.optimizer, run.groups)


def step(run: Run, replay: Replay, number: int) -> None:
    batches = random_batches(run.config, number, run.groups.data.rank(), run.groups.data.size())
    train_step(run.engine, run.model_chunks, batches, replay.run)


def message(rank: int, world_size: int, make: Fault, bad_rank: int, batch: int, *overrides: str) -> str:
    """Learns batch 1 by heart, so that another batch is a spike; then a step on `batch` with a fault on `bad_rank`."""
    run, replay = started(*overrides)
    for _ in range(LEARNED_STEPS):
        step(run, replay, 1)
        assert not replay.repeated  # a step that is not suspicious is executed once
    with pytest.MonkeyPatch.context() as monkeypatch, (make if rank == bad_rank else nothing)(monkeypatch):  # pyright: ignore
        try:
            step(run, replay, batch)
        except RunError as error:
            return str(error)
    seen = f"skipped {int(run.optimizer.skipped_steps)}, repeated {replay.repeated}"
    step(run, replay, 1)  # the run goes on
    assert not replay.repeated
    return seen


def zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


LAYOUTS = [
    (zero(0),),
    (zero(1), "optimizer.gradient_reduction=micro_batch"),
    (zero(2),),
    (zero(3),),
]


@pytest.mark.parametrize(("bad_rank", "layout"), list(zip([1, 0, 1, 1], LAYOUTS, strict=True)), ids=str)
def test_a_flip_in_a_gradient_of_a_spike_names_rank_and_matrix(bad_rank: int, layout: tuple[str, ...]) -> None:
    """The last bit of one number of one rank. The means that other ranks make of it are not named."""
    messages = run_distributed(message, 2, low_bit_flipped, bad_rank, 2, *layout)
    assert len(set(messages)) == 1
    first, named, *rest = messages[0].splitlines()
    assert f"step {LEARNED_STEPS + 1} was skipped" in first and f"rank(s) {bad_rank} computed something else" in first
    assert named == f"rank {bad_rank}: gradient of {MATRIX}" and len(rest) == 1


@pytest.mark.parametrize("layout", [*LAYOUTS, ("parallel.tensor=2",), ("parallel.pipeline=2",)], ids=str)
def test_a_spike_without_a_flip_is_the_data(layout: tuple[str, ...]) -> None:
    """Control of the tests here: the same steps. The step is skipped, and the next one is made."""
    assert run_distributed(message, 2, nothing, 0, 2, *layout) == ["skipped 1, repeated True"] * 2


def test_a_flip_that_makes_the_norm_overflow_is_found_without_a_spike() -> None:
    """On the learned batch. Without the flip nothing is skipped."""
    (found, other) = run_distributed(message, 2, high_bit_flipped, 1, 1, "training.spike_deviations=null")
    assert found == other and f"rank 1: gradient of {MATRIX}" in found.splitlines()
    assert run_distributed(message, 2, nothing, 1, 1, "training.spike_deviations=null")[0].startswith("skipped 0")


def test_a_flip_in_a_transfer_names_the_rank_that_received_it() -> None:
    found, _ = run_distributed(message, 2, transfer_flipped_once, 1, 2, zero(1))
    assert "rank(s) 1 received from other ranks something else" in found
    assert f"rank 1: mean gradient of {MATRIX}" in found.splitlines()


def states(rank: int, world_size: int, with_replay: bool) -> tuple[dict, bool]:
    run, replay = start(*SETTINGS), None
    if with_replay:
        replay = Replay(run.forward_backward, run.model_chunks, run.optimizer, run.groups)
    forward_backward = run.forward_backward if replay is None else replay.run
    repeated = False
    for number in [1] * LEARNED_STEPS + [2, 1]:
        run.step(number, forward_backward)
        repeated |= replay is not None and replay.repeated
    return whole_state(run), repeated


def test_replay_changes_no_bit() -> None:
    (found, repeated), (wanted, _) = (run_distributed(states, 2, flag)[0] for flag in (True, False))
    assert repeated
    assert_equal(found, wanted)


# ---- after a failed replica check ----


def after_check(rank: int, world_size: int, make: Fault, bad_rank: int) -> str:
    run, replay = started()
    step(run, replay, 1)
    with pytest.MonkeyPatch.context() as monkeypatch, (make if rank == bad_rank else nothing)(monkeypatch):  # pyright: ignore
        return replay.after_failed_replica_check()


def test_a_rank_that_computes_wrongly_after_a_failed_replica_check_is_named() -> None:
    found, other = run_distributed(after_check, 2, low_bit_flipped, 1)
    assert found == other and f"rank 1: gradient of {MATRIX}" in found.splitlines()
    assert "with the same bits on every rank" in run_distributed(after_check, 2, nothing, 1)[0]


# ---- the parts ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_bit_of_a_gradient_shows_in_its_checksum(dtype: torch.dtype) -> None:
    gradient = torch.randn(3, 5).to(dtype)
    words = gradient.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[gradient.element_size()])
    seen = {int(checksum(gradient))}
    for bit in range(8 * gradient.element_size() - 1):
        words[1, 2] ^= 1 << bit
        seen.add(int(checksum(gradient)))
        words[1, 2] ^= 1 << bit
    assert len(seen) == 8 * gradient.element_size()


def test_the_message_names_ranks_and_shortens_long_lists() -> None:
    assert fault([[], []]) == ""
    many = [f"gradient of {i}" for i in range(9)]
    text = fault([["mean gradient of 0"], [], many])
    assert text.startswith("rank(s) 2 computed") and "rank 0" not in text and "and 3 more" in text
