"""Gradients from this rank's backward passes to the ranks that own pieces of them: one way for codes and ordinary parameters.

    backward of micro-batch m  ->  local sum over micro-batches  ->  mean over data-parallel ranks, at the owner

When the second arrow is taken:

    ZeRO stage 0, 1   at the end of the step, weight after weight
    ZeRO stage 2, 3   in the backward pass of the last micro-batch, as soon as a weight's gradient is complete: the exchange runs
                      beside the backward of the layers below, and the whole gradient is freed as soon as it has been sent
    optimizer.gradient_reduction = "micro_batch"   in every backward pass, whatever the stage: only owned pieces are ever added
                      up, for M times the traffic
    optimizer.fused_backward                       in the backward pass of the only micro-batch, whatever the stage, for low-bit
                      matrices: their owner takes the mean at once (`Gradient.consume`) and it is freed

In all of them an element is first added up over micro-batches on its rank and then over ranks in rank order by its owner
(row_sharding.py), or with "micro_batch" the other way round. So the four stages give the same bits. DeepSpeed reduces nothing:
its sums follow the backend's algorithm and its bucket sizes, divide before or after the sum depending on the stage, and would
make stages differ.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dqt_dist.kernels.square_sum import square_sum
from dqt_dist.parallel.groups import Group
from dqt_dist.parallel.row_sharding import Bounds, PendingSum, start_gather, start_sum

# Exchanges under way at once: one travels while the next weight's gradient is computed. Each holds its gradient twice.
MAX_IN_FLIGHT = 2


@dataclass
class Gradient:
    """The gradient of one weight, [rows, columns] as its owners divide it."""

    name: str
    rows: int
    columns: int
    bounds: Bounds
    """Rows that each data-parallel rank owns."""
    to_all: bool
    """Every rank gets the mean of every row (ZeRO stage 0)."""
    take: Callable[[], Tensor | None]
    """Hands over this rank's sum over micro-batches and forgets it; None when there is none."""
    kept: Tensor | None = None
    """Where a CUDA graph writes this rank's sum in every step; nothing is taken then."""
    mean: Tensor | None = None
    """Reduced, [owned rows, columns], or all rows with `to_all`; alive from the reduction to the update."""
    consume: Callable[[Tensor], None] | None = None
    """Takes the mean as soon as it is there; `mean` then stays None."""
    square_sum: Tensor | None = None
    """Sum of squares of the mean that was consumed last, in parts, fp64."""
    arrivals: int = field(default=0)
    """Micro-batches of this step whose backward has reached the weight."""


class GradientReducer:
    """Takes gradients when they arrive and has all of them reduced when `finish` returns."""

    def __init__(self, group: Group, num_microbatches: int, *, in_backward: bool, each_micro_batch: bool) -> None:
        self.group, self.num_microbatches = group, num_microbatches
        self.in_backward, self.each_micro_batch = in_backward, each_micro_batch
        self.gradients: list[Gradient] = []
        self._in_flight: deque[tuple[Gradient, PendingSum]] = deque()

    def add(self, gradient: Gradient) -> Callable[[], None]:
        """Registers a gradient, in the same order on every rank; returns what to call when a backward has added to it.

        That refers to the reducer weakly: autograd holds hooks of parameters where Python does not look for cycles, and by way of
        the reducer one would keep the parameters themselves.
        """
        self.gradients.append(gradient)
        reducer = weakref.proxy(self)
        return lambda: reducer._arrived(gradient)

    @torch.no_grad()
    def _arrived(self, gradient: Gradient) -> None:
        gradient.arrivals += 1
        complete = gradient.arrivals == self.num_microbatches
        in_backward = self.in_backward or gradient.consume is not None
        if self.each_micro_batch or (in_backward and complete):
            self._start(gradient)

    def _start(self, gradient: Gradient) -> None:
        local = gradient.take() if gradient.kept is None else gradient.kept
        if local is None:
            return
        if self.group.size() == 1:
            self._add(gradient, local.view(gradient.rows, gradient.columns))
            return
        element_bounds = [(start * gradient.columns, stop * gradient.columns) for start, stop in gradient.bounds]
        self._in_flight.append((gradient, start_sum(local.view(-1), element_bounds, self.group)))
        if len(self._in_flight) > MAX_IN_FLIGHT:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        gradient, pending = self._in_flight.popleft()
        self._add(gradient, pending.finish().view(-1, gradient.columns))

    def _add(self, gradient: Gradient, mean: Tensor) -> None:
        """Adds the owned rows of a mean, or has them consumed."""
        if gradient.consume is None:
            gradient.mean = mean if gradient.mean is None else gradient.mean.add_(mean)
            return
        if gradient.to_all:
            mean = self._gather(gradient, mean)
        gradient.square_sum = square_sum(mean)
        gradient.consume(mean)

    def _gather(self, gradient: Gradient, mean: Tensor) -> Tensor:
        if self.group.size() == 1:
            return mean
        return start_gather(mean, gradient.rows, self.group, "gradients").finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Reduces what is left; afterwards every gradient has its `mean` or was consumed. Raises RuntimeError for one that never
        came."""
        for gradient in self.gradients:
            if gradient.arrivals != self.num_microbatches:
                raise RuntimeError(
                    f"{gradient.arrivals} of {self.num_microbatches} micro-batches gave {gradient.name} a gradient"
                )
            gradient.arrivals = 0
            self._start(gradient)
        while self._in_flight:
            self._finish_oldest()
        for gradient in self.gradients:
            if gradient.to_all and gradient.consume is None:
                assert gradient.mean is not None
                gradient.mean = self._gather(gradient, gradient.mean)

    def square_norm(self, gradients: list[Gradient]) -> Tensor:
        """Sum of squares over `gradients` of the elements that this data-parallel rank alone counts, fp64 scalar.

        In fp64 the way the elements are divided over ranks moves the sum by 1e-16 of itself, so that the fp32 norm and clip
        factor that are made of it are the same in every ZeRO stage but for about one step in 10^8.
        """
        counted = [g for g in gradients if not g.to_all or self.group.rank() == 0]
        sums = [g.square_sum if g.mean is None else square_sum(g.mean) for g in counted]
        sums = [total for total in sums if total is not None]
        return torch.cat(sums).sum() if sums else torch.zeros((), dtype=torch.float64)
