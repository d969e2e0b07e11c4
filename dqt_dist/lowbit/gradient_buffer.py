"""GradientBuffer: the gradient of one weight, from the backward passes to the update.

Backward passes add micro-batches to `local`, this rank's sum [rows, columns]. The state says where the mean over
data-parallel ranks is:

    ACCUMULATE   there is no mean yet; micro-batches are added up
    REDUCE       `local` was sent; the mean is on its way to the owners of the rows
    TAKE         `mean` has arrived and waits for the update                                [owned rows, columns]

    ACCUMULATE --send--> REDUCE --receive--> TAKE --take--> ACCUMULATE
                           TAKE --send--> REDUCE      with EVERY_BACKWARD only: the next micro-batch is added to `mean`

`optim/gradient_reducer.py` moves a buffer from ACCUMULATE to TAKE, at the time that `ReduceWhen` says. With
EVERY_BACKWARD the next micro-batch is added to `local` while the buffer is in REDUCE or TAKE, and `mean` is a sum of
means. A buffer with a consumer never waits in TAKE: the consumer gets the mean at once. Codes and ordinary parameters
use the same buffer. A parameter is a matrix with one column.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

import torch
from torch import Tensor

# Of Knuth's MMIX generator: earlier gradients of a step count with another weight than the last.
_ODD = 6364136223846793005


def checksum(tensor: Tensor) -> Tensor:
    """The sum of the words of a tensor of 2, 4 or 8 bytes per element, mod 2^64: an int64 scalar on its device.

    A change of one word always shows. The tensor is read once, without temporaries.
    """
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(words).sum(dtype=torch.int64)


class GradientState(Enum):
    """The state of a buffer; see the table above."""

    ACCUMULATE = auto()
    REDUCE = auto()
    TAKE = auto()


class ReduceWhen(Enum):
    """When a gradient is sent to its owners."""

    LAST_BACKWARD = auto()
    """In the backward pass of the last micro-batch, as soon as the gradient is complete."""
    EVERY_BACKWARD = auto()
    """In each backward pass. Only owned rows are added up over micro-batches; there is one exchange per micro-batch."""


class Reducer(Protocol):
    """What a buffer calls after each micro-batch."""

    def micro_batch_added(self, buffer: GradientBuffer) -> None: ...


class GradientBuffer:
    """The gradient of one weight. Without a reducer it only accumulates."""

    def __init__(self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> None:
        self.name, self.rows, self.columns = name, rows, columns
        self.dtype = dtype
        """Type in which micro-batches are added up and in which the gradient travels."""
        self.state = GradientState.ACCUMULATE
        self.micro_batches = 0
        """Number of micro-batches of this step that have been added."""
        self.local: Tensor | None = None
        """This rank's sum over micro-batches, `rows * columns` elements. None before the first micro-batch."""
        self.mean: Tensor | None = None
        """Mean over data-parallel ranks, [owned rows, columns], or all rows with `on_every_rank`."""
        self.recorded: Tensor | None = None
        """Memory that a CUDA graph writes the mean of the owned rows to. It keeps its address between steps."""
        # The fields below are set when the buffer is registered with a reducer.
        self.owners: list[tuple[int, int]] = []
        """[start, stop) per data-parallel rank: the rows that the rank owns."""
        self.on_every_rank = False
        """Whether every rank gets the mean of every row (ZeRO stage 0)."""
        self.reduce_when = ReduceWhen.LAST_BACKWARD
        self.consumer: Callable[[Tensor], None] | None = None
        """Called with the mean as soon as the mean has arrived."""
        self.square_sum: Tensor | None = None
        """Sum of squares of the mean that was consumed last, in parts to be added up, fp64."""
        self.digest: Tensor | None = None
        """Checksum of the sums that were handed over since whoever has set it has set it to 0; an int64 scalar."""
        self._reducer: weakref.ref[Reducer] | None = None

    def attach(self, reducer: Reducer) -> None:
        """Makes the buffer call `reducer` after each micro-batch.

        The reference is weak. Autograd holds the hooks of a parameter where Python's garbage collector finds no cycles.
        A strong reference would close the cycle parameter, hook, buffer, reducer, parameter, and the parameter would
        never be freed.
        """
        self._reducer = weakref.ref(reducer)

    # ---- accumulate ----

    def accumulator(self, device: torch.device) -> tuple[Tensor, bool]:
        """Returns `local` as [rows, columns], and whether to add to it. If False, the memory must be overwritten.

        The caller writes to the accumulator and then calls `micro_batch_added`.
        """
        if self.local is None:
            self.local = torch.empty(self.rows, self.columns, dtype=self.dtype, device=device)
            return self.local, False
        return self.local, True

    def add(self, gradient: Tensor) -> None:
        """Adds the gradient of one micro-batch. The first of a step becomes `local` itself if its type is `dtype`."""
        if self.local is None:
            self.local = gradient.to(self.dtype)
        else:
            self.local.add_(gradient)
        self.micro_batch_added()

    def micro_batch_added(self) -> None:
        """Counts a micro-batch and calls the reducer."""
        self.micro_batches += 1
        reducer = None if self._reducer is None else self._reducer()
        if reducer is not None:
            reducer.micro_batch_added(self)

    # ---- reduce ----

    def send(self) -> Tensor:
        """Hands over this rank's sum."""
        assert self.local is not None and self.state is not GradientState.REDUCE, (self.name, self.state)
        local, self.local, self.state = self.local, None, GradientState.REDUCE
        if self.digest is not None:
            self.digest.mul_(_ODD).add_(checksum(local))
        return local

    def receive(self, mean: Tensor) -> None:
        """Stores the mean of the owned rows, or adds it to the means of earlier micro-batches."""
        assert self.state is GradientState.REDUCE, (self.name, self.state)
        self.mean = mean if self.mean is None else self.mean.add_(mean)
        self.state = GradientState.TAKE

    # ---- take ----

    def take(self) -> Tensor:
        """Hands over the mean to the update."""
        assert self.mean is not None and self.state is GradientState.TAKE, (self.name, self.state)
        mean, self.mean, self.state = self.mean, None, GradientState.ACCUMULATE
        return mean

    # ---- CUDA graphs ----

    def record(self) -> None:
        """Called after the CUDA graphs of a step were recorded. Keeps the memory that the graphs write the mean to.

        Recording computes nothing, so the buffer counts no micro-batch.
        """
        self.recorded, self.micro_batches = self.take(), 0

    def replayed(self, num_micro_batches: int) -> None:
        """Called after the graphs of a step have run. What the graphs wrote is the mean of the owned rows."""
        self.mean, self.state, self.micro_batches = self.recorded, GradientState.TAKE, num_micro_batches
