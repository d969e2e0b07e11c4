"""The forward and backward passes of a step as CUDA graphs (training.cuda_graph).

Python launches about two thousand kernels per micro-batch, and more where ranks exchange activations. When the GPU
finishes the kernels sooner than Python launches them, the GPU waits. This is always so for models of some hundred
million weights, and on a slow processor also for a model of a billion weights, small micro-batches or several ranks. A
graph is launched as a whole and runs the same kernels and the same NCCL calls on the same addresses. Results equal
those of `step.run_schedule`, bit for bit.

    step 1, 2      no graph: kernels are compiled and libraries are initialised
    step 3         the graphs are recorded
    step 3 and on  batches are copied to the memory that the graphs read, the graphs run, and the gradient buffers hold
                   the means at the recorded addresses

A graph holds a part of a step. With a pipeline the schedule of all micro-batches, with the messages between the stages,
is one graph. Otherwise a graph holds one micro-batch, and micro-batches in the same place share a graph:

    first      writes this rank's sums of gradients
    middle     adds to these sums
    last       adds to these sums and sends them to their owners, while the backward pass runs
    only       the one micro-batch of a step: writes and sends

A graph holds addresses and numbers. Codes and parameters therefore keep their addresses and change in place. The
optimizer runs outside the graphs, because step number and learning rate change. Activations, and the gradients of owned
rows, stay allocated between steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dqt_dist.config import Config, uses_cuda_graph
from dqt_dist.errors import UserError
from dqt_dist.optim.engine import CombinedOptimizer
from dqt_dist.parallel.collectives import BYTES_SENT
from dqt_dist.parallel.groups import CLOSED_FIRST, Groups
from dqt_dist.training.step import Batch, ForwardBackward, run_schedule

# Steps before the recording. The first compiles all kernels. The second runs as the recording will, so that an error
# shows here and not during the recording.
EAGER_STEPS = 2

Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Records a function without running it. Returns the memory of the function's result, and what runs the recording."""


def choose_forward_backward(
    model_chunks: nn.ModuleList, optimizer: CombinedOptimizer, config: Config, groups: Groups
) -> ForwardBackward:
    """The function that runs the micro-batches of a step: as CUDA graphs or kernel by kernel, as the config says.

    Raises UserError when the config requires graphs and there is no CUDA device.
    """
    on_gpu = groups.device.type == "cuda"
    if config.training.cuda_graph is True and not on_gpu:
        raise UserError('training.cuda_graph: true needs a CUDA device, and this run has none; use "auto" or false')
    if uses_cuda_graph(config) and on_gpu:
        return StepGraphs(model_chunks, optimizer, config, groups, CudaRecord()).run
    return partial(run_schedule, model_chunks, config=config, groups=groups, forward_only=False)


class CudaRecord:
    """Records CUDA graphs that share one memory pool. See also `groups.select_stream`."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: list[torch.cuda.CUDAGraph] = []
        CLOSED_FIRST.add(self)

    def close(self) -> None:
        """Frees the graphs."""
        for graph in self.graphs:
            graph.reset()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # "thread_local" allows CUDA calls of other threads during the recording, such as the loader's thread that pins
        # memory, and NCCL's watchdog.
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            result = function()
        self.graphs.append(graph)
        return result, graph.replay


@dataclass
class RecordedPart:
    """The recording of a part of a step."""

    batches: list[Batch]
    """The memory that the recording reads."""
    loss: Tensor
    replay: Callable[[], None]
    sent: Counter[str]
    """Bytes that this rank sends in a replay, by kind."""

    def run(self, batches: list[Batch]) -> Tensor:
        """Runs the part on other batches. Returns this rank's mean loss."""
        for memory, batch in zip(self.batches, batches, strict=True):
            for name, tensor in batch.items():
                memory[name].copy_(tensor, non_blocking=True)
        self.replay()
        BYTES_SENT.update(self.sent)
        return self.loss.clone()


class StepGraphs:
    """Runs the micro-batches of a step, and records the graphs in step 3."""

    def __init__(
        self,
        model_chunks: nn.ModuleList,
        optimizer: CombinedOptimizer,
        config: Config,
        groups: Groups,
        record: Record,
    ) -> None:
        self.model_chunks, self.config, self.groups = model_chunks, config, groups
        self.reducer = optimizer.reducer
        self.record = record
        self.eager_steps = 0
        self.parts: list[RecordedPart] = []
        """The parts of a step, in order. Middle micro-batches are one object, as often as there are such batches."""

    def run(self, batches: list[Batch]) -> Tensor:
        """Does what `step.run_schedule` does with forward_only=False. Returns this rank's mean loss."""
        if self.eager_steps < EAGER_STEPS:
            self.eager_steps += 1
            return run_schedule(self.model_chunks, batches, self.config, self.groups, forward_only=False)
        if not self.parts:
            self._record(batches)
        size = len(batches) // len(self.parts)
        losses = [part.run(batches[i * size : (i + 1) * size]) for i, part in enumerate(self.parts)]
        for buffer in self.reducer.buffers:
            buffer.replayed(len(batches))
        return torch.stack(losses).mean()

    def _record(self, batches: list[Batch]) -> None:
        if self.config.parallel.pipeline > 1:
            self.parts = [self._record_part(0, batches, loss_divisor=1)]
        else:
            last = len(batches) - 1
            recorded = {
                index: self._record_part(index, [batches[index]], loss_divisor=len(batches))
                for index in sorted({0, min(1, last), last})
            }
            self.parts = [recorded.get(index, recorded[min(1, last)]) for index in range(len(batches))]
        for buffer in self.reducer.buffers:
            buffer.record()

    def _record_part(self, first: int, batches: list[Batch], loss_divisor: int) -> RecordedPart:
        """Records `batches`, the first of which is micro-batch `first` of the step."""
        memory = [
            {name: tensor.to(self.groups.device, copy=True) for name, tensor in batch.items()} for batch in batches
        ]
        for buffer in self.reducer.buffers:
            buffer.micro_batches = first

        def function() -> Tensor:
            loss = run_schedule(
                self.model_chunks, memory, self.config, self.groups, forward_only=False, loss_divisor=loss_divisor
            )
            # A graph ends when all that it has started has ended.
            self.reducer.drain()
            return loss

        before = BYTES_SENT.copy()
        loss, replay = self.record(function)
        sent = BYTES_SENT - before
        BYTES_SENT.subtract(sent)  # a recording sends nothing
        return RecordedPart(memory, loss, replay, sent)
