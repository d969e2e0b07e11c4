"""A loss far above those before it is a step that no rank makes, and a resumed run decides as the uninterrupted one."""

from __future__ import annotations

import math

import pytest
import torch

from dqt_dist.optim.loss_spikes import is_spike, losses_of, new_window, pushed
from dqt_dist.training.step import train_step
from tests.distributed import run_distributed
from tests.parallel.runs import Run, Whole, start, whole_state
from tests.small import random_batches

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def loss(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


# ---- the decision ----


def test_a_spike_lies_above_the_mean_by_more_than_its_deviations() -> None:
    """Mean 5, standard deviation 2."""
    window = new_window(8, [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0], CPU)
    assert is_spike(loss(11.01), window, 3.0) and not is_spike(loss(10.99), window, 3.0)
    assert not is_spike(loss(-100.0), window, 3.0)
    assert is_spike(loss(math.inf), window, 3.0)


def test_nothing_is_a_spike_until_the_window_is_full() -> None:
    window = new_window(3, [], CPU)
    for value in (1.0, 2.0, 3.0):
        assert not is_spike(loss(1e9), window, 1.0)
        window = pushed(window, loss(value), YES)
    assert is_spike(loss(1e9), window, 1.0)


def test_the_window_forgets_the_oldest_and_takes_no_skipped_loss() -> None:
    window = new_window(3, [1.0, 2.0], CPU)
    assert losses_of(window) == [1.0, 2.0]
    window = pushed(pushed(window, loss(3.0), YES), loss(99.0), NO)
    assert losses_of(window) == [1.0, 2.0, 3.0]
    assert losses_of(pushed(window, loss(4.0), YES)) == [2.0, 3.0, 4.0]
    assert losses_of(new_window(2, losses_of(window), CPU)) == [2.0, 3.0]  # another spike_window after a resume


# ---- in a run ----

LEARNED_STEPS = 6
SPIKES = ("training.spike_deviations=3", "training.spike_window=4", "training.steps=20")
DECAY = "optimizer.low_bit_weight_decay=1.0"


def other_batch(run: Run, number: int) -> Whole:
    """The state after a step on a batch that the run has not learned by heart."""
    batches = random_batches(run.config, number, run.groups.data.rank(), run.groups.data.size())
    train_step(run.engine, run.model_chunks, batches, run.forward_backward)
    return {name: tensor.clone() for name, tensor in whole_state(run).items()}


def states_around_a_spike(rank: int, world_size: int, *overrides: str) -> tuple[Whole, Whole, Whole, tuple]:
    """Learns one batch by heart, so that any other is a spike. Returns the states before and after the spike and after
    a further step on the learned batch, and the counts of skipped steps."""
    run = start(*overrides)
    for _ in range(LEARNED_STEPS):
        run.step(1)
    before = {name: tensor.clone() for name, tensor in whole_state(run).items()}
    after = other_batch(run, 2)
    counts = (int(run.optimizer.skipped_steps), int(run.optimizer.skipped_in_a_row_on_host))
    run.step(1)
    return before, after, whole_state(run), (*counts, int(run.optimizer.skipped_in_a_row))


def changed(first: Whole, second: Whole) -> set[str]:
    """The kinds of weights that differ."""
    weights = [name for name in first if name.startswith(("codes/", "scale/", "latent", "parameter/"))]
    return {name.split("/")[0] for name in weights if not torch.equal(first[name], second[name])}


@pytest.mark.parametrize(
    "layout",
    [
        (1,),
        (2, "deepspeed.zero_optimization.stage=1"),
        (2, "parallel.pipeline=2"),
        (2, "parallel.tensor=2", "quantization.latent_bits=6"),
        (1, "optimizer.name=adafactor", "optimizer.beta1=0.9"),
    ],
    ids=str,
)
def test_a_spike_changes_no_weight_on_any_rank(layout: tuple) -> None:
    """Low-bit weight decay is on: it would move codes."""
    world_size, *overrides = layout
    results = run_distributed(states_around_a_spike, world_size, *SPIKES, DECAY, *overrides)
    before, after, later, _ = results[0]
    assert [counts for *_, counts in results] == [(1, 1, 0)] * world_size
    assert changed(before, after) == set()
    assert {"codes", "parameter"} <= changed(after, later)  # the run goes on


def test_without_spike_deviations_the_same_step_is_made() -> None:
    """Control."""
    before, after, _, counts = run_distributed(states_around_a_spike, 1, "training.steps=20", DECAY)[0]
    assert counts == (0, 0, 0) and {"codes", "parameter"} <= changed(before, after)
