"""A gradient buffer goes through ACCUMULATE, REDUCE and TAKE, and refuses calls that its state does not allow."""

from __future__ import annotations

import pytest
import torch

from dqt_dist.lowbit.gradient_buffer import GradientBuffer, GradientState


class Listener:
    def __init__(self) -> None:
        self.heard: list[int] = []

    def micro_batch_added(self, buffer: GradientBuffer) -> None:
        self.heard.append(buffer.micro_batches)


def test_the_accumulator_is_made_once_and_then_added_to() -> None:
    buffer = GradientBuffer("w", 9, 12)
    first, had_sum = buffer.accumulator(torch.device("cpu"))
    assert (first.shape, first.dtype, had_sum) == ((9, 12), torch.float32, False)
    second, has_sum = buffer.accumulator(torch.device("cpu"))
    assert second is first and has_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_gradient_becomes_the_sum_where_types_agree(dtype: torch.dtype) -> None:
    buffer, gradient = GradientBuffer("w", 2, 2, dtype), torch.full((2, 2), 1.5)
    buffer.add(gradient)
    assert buffer.local is not None and (buffer.local is gradient) == (dtype == torch.float32)
    buffer.add(torch.ones(2, 2))
    assert buffer.local.dtype == dtype and torch.equal(buffer.local.float(), torch.full((2, 2), 2.5))


def test_states_follow_one_another() -> None:
    buffer = GradientBuffer("w", 2, 2)
    buffer.add(torch.ones(2, 2))
    assert buffer.state is GradientState.ACCUMULATE
    with pytest.raises(AssertionError):
        buffer.take()  # nothing was reduced
    local = buffer.send()
    assert buffer.state is GradientState.REDUCE and buffer.local is None
    with pytest.raises(AssertionError):
        buffer.take()  # the mean is still on its way
    buffer.receive(local)
    assert buffer.state is GradientState.TAKE
    assert buffer.take() is local
    assert buffer.state is GradientState.ACCUMULATE and buffer.mean is None
    with pytest.raises(AssertionError):
        buffer.receive(local)  # nothing was sent


def test_means_of_micro_batches_add_up_before_they_are_taken() -> None:
    buffer = GradientBuffer("w", 1, 2)
    for _ in range(3):
        buffer.add(torch.ones(1, 2))
        buffer.receive(buffer.send())
    assert torch.equal(buffer.take(), torch.full((1, 2), 3.0))


def test_a_reducer_hears_of_each_micro_batch_and_is_not_kept_alive() -> None:
    buffer, listener = GradientBuffer("w", 1, 1), Listener()
    heard = listener.heard
    buffer.attach(listener)
    buffer.add(torch.ones(1, 1))
    buffer.add(torch.ones(1, 1))
    assert heard == [1, 2]
    del listener
    buffer.add(torch.ones(1, 1))
    assert heard == [1, 2] and buffer.micro_batches == 3


def test_what_a_graph_writes_stays_where_it_is() -> None:
    buffer = GradientBuffer("w", 1, 2)
    buffer.add(torch.ones(1, 2))
    written = buffer.send()
    buffer.receive(written)
    buffer.record()
    assert buffer.mean is None and buffer.micro_batches == 0 and buffer.recorded is written
    for _ in range(2):
        buffer.replayed(4)
        assert buffer.micro_batches == 4
        assert buffer.take() is written and buffer.mean is None
    assert buffer.recorded is written
