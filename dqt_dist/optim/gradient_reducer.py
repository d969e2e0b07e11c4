"""Reduces gradients: from the backward passes of this rank to the ranks that own pieces of the gradients.

    backward of micro-batch m  ->  local sum over micro-batches  ->  mean over data-parallel ranks, at the owner

Codes and ordinary parameters take the same path (`lowbit/gradient_buffer.py` has the states of a gradient).
`ReduceWhen` says when the second arrow is taken:

    LAST_BACKWARD    in the backward pass of the last micro-batch, as soon as a gradient is complete. The exchange
                     overlaps with the backward of the layers below. The whole gradient is freed as soon as it has been
                     sent. optimizer.fused_backward: the consumer gets the mean at once.
    EVERY_BACKWARD   optimizer.gradient_reduction = "micro_batch", in every stage

With training.cuda_graph the exchanges are part of the graphs (`training/cuda_graph.py`).

An element is first summed over micro-batches by each rank, then over ranks in rank order by its owner
(`parallel/row_sharding.py`). With EVERY_BACKWARD the two sums change places. The order of the sums does not depend on
the ZeRO stage, so all four stages give the same bits. DeepSpeed reduces no gradient. The order of DeepSpeed's sums
depends on the backend's algorithm and on bucket sizes, and DeepSpeed divides before or after the sum depending on the
stage: stages would differ.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from dqt_dist.config import Config
from dqt_dist.kernels.square_sum import square_sum
from dqt_dist.lowbit.gradient_buffer import GradientBuffer, GradientState, ReduceWhen
from dqt_dist.parallel.groups import Group
from dqt_dist.parallel.row_sharding import Bounds, PendingSum, start_gather, start_sum

# Exchanges in flight at once. One exchange runs while the gradient of the next weight is computed. Each exchange holds
# its gradient twice.
MAX_IN_FLIGHT = 2


def reduce_when(config: Config) -> ReduceWhen:
    """When gradients leave for their owners in a run with this config."""
    if config.optimizer.gradient_reduction == "micro_batch":
        return ReduceWhen.EVERY_BACKWARD
    return ReduceWhen.LAST_BACKWARD


class GradientReducer:
    """Reduces each registered buffer at the time its `reduce_when` says. `finish` ends the exchanges of a step."""

    def __init__(self, group: Group, num_micro_batches: int) -> None:
        self.group, self.num_micro_batches = group, num_micro_batches
        self.buffers: list[GradientBuffer] = []
        self._in_flight: deque[tuple[GradientBuffer, PendingSum]] = deque()

    def register(
        self,
        buffer: GradientBuffer,
        owners: Bounds,
        when: ReduceWhen,
        *,
        on_every_rank: bool,
        consumer: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Registers a buffer, in the same order on every rank. The arguments are fields of `GradientBuffer`."""
        buffer.owners, buffer.reduce_when = owners, when
        buffer.on_every_rank, buffer.consumer = on_every_rank, consumer
        buffer.attach(self)
        self.buffers.append(buffer)

    @torch.no_grad()
    def micro_batch_added(self, buffer: GradientBuffer) -> None:
        """Called by a buffer after a backward pass has added to the buffer."""
        complete = buffer.micro_batches == self.num_micro_batches
        if buffer.reduce_when is ReduceWhen.EVERY_BACKWARD or (
            buffer.reduce_when is ReduceWhen.LAST_BACKWARD and complete
        ):
            self._start(buffer)

    @torch.no_grad()
    def finish(self) -> None:
        """Ends what the backward passes have started. Then every buffer is in TAKE, or its mean was consumed.

        Raises RuntimeError for a gradient that did not come from every micro-batch.
        """
        for buffer in self.buffers:
            if buffer.micro_batches != self.num_micro_batches:
                raise RuntimeError(
                    f"{buffer.micro_batches} of {self.num_micro_batches} micro-batches gave {buffer.name} a gradient"
                )
            buffer.micro_batches = 0
        self.drain()
        gathers = [
            (buffer, start_gather(buffer.mean, buffer.rows, self.group, "gradients"))
            for buffer in self.buffers
            if buffer.on_every_rank and buffer.mean is not None and self.group.size() > 1
        ]
        for buffer, gather in gathers:
            buffer.mean = gather.finish()

    @torch.no_grad()
    def drain(self) -> None:
        """Waits for the exchanges in flight."""
        while self._in_flight:
            self._finish_oldest()

    def square_norm(self, buffers: list[GradientBuffer]) -> Tensor:
        """Sum of squares over the elements of `buffers` that this data-parallel rank counts, fp64 scalar.

        Each element is counted by one data-parallel rank. In fp64 the division of the elements over ranks changes the
        sum by 1e-16 of its value. The fp32 norm and the clip factor made of this sum are then the same in every ZeRO
        stage, except for about one step in 10^8.
        """
        counted = [buffer for buffer in buffers if not buffer.on_every_rank or self.group.rank() == 0]
        sums = [buffer.square_sum if buffer.mean is None else square_sum(buffer.mean) for buffer in counted]
        sums = [total for total in sums if total is not None]
        return torch.cat(sums).sum() if sums else torch.zeros((), dtype=torch.float64)

    def _start(self, buffer: GradientBuffer) -> None:
        """Starts to send this rank's sum to the owners."""
        while buffer.state is GradientState.REDUCE:  # an earlier micro-batch is still in flight
            self._finish_oldest()
        local = buffer.send()
        if self.group.size() == 1:
            self._deliver(buffer, local.view(buffer.rows, buffer.columns))
            return
        element_bounds = [(start * buffer.columns, stop * buffer.columns) for start, stop in buffer.owners]
        self._in_flight.append((buffer, start_sum(local.view(-1), element_bounds, self.group)))
        if len(self._in_flight) > MAX_IN_FLIGHT:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        buffer, pending = self._in_flight.popleft()
        self._deliver(buffer, pending.finish().view(-1, buffer.columns))

    def _deliver(self, buffer: GradientBuffer, mean: Tensor) -> None:
        """Gives the mean of the owned rows to the buffer, and to the buffer's consumer if there is one."""
        buffer.receive(mean)
        if buffer.consumer is None:
            return
        mean = buffer.take()
        if buffer.on_every_rank:
            mean = self._gather(buffer, mean)
        buffer.square_sum = square_sum(mean)
        buffer.consumer(mean)

    def _gather(self, buffer: GradientBuffer, mean: Tensor) -> Tensor:
        if self.group.size() == 1:
            return mean
        return start_gather(mean, buffer.rows, self.group, "gradients").finish()
