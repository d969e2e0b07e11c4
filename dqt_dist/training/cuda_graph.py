"""Forward and backward of a micro-batch as one CUDA graph (training.cuda_graph).

Python launches some two thousand kernels for a micro-batch. Where the GPU is done with them sooner than Python is with launching,
the GPU waits: always for models of some hundred million weights, and on a slow processor for one of a billion. A graph is launched
as a whole, and runs the same kernels on the same addresses: results are those of `step.run_schedule`, bit for bit.

    step 1, 2    as without a graph: kernels are compiled, libraries set up
    step 3       two graphs are recorded, each of one micro-batch: the first of a step, whose gradients are written, and any other,
                 whose gradients are added to those
    from then    batches are copied to where the graphs read them, the graphs run, and the sums of gradients are where they always are

What goes into a graph are addresses and numbers: codes and parameters stay where they are and change in place; the optimizer, whose
step and rate change, runs outside. Activations and gradients stay allocated between steps.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from dqt_dist.config import Config, uses_cuda_graph
from dqt_dist.errors import UserError
from dqt_dist.optim.engine import CombinedOptimizer
from dqt_dist.parallel.groups import Groups
from dqt_dist.training.step import Batch, ForwardBackward, run_schedule

# Steps before the recording. One would do; the second finds everything compiled, so that a mistake shows here and not in a recording.
EAGER_STEPS = 2


def choose_forward_backward(
    chunks: nn.ModuleList, optimizer: CombinedOptimizer, config: Config, groups: Groups
) -> ForwardBackward:
    """How a run with this config runs its micro-batches: as graphs, or kernel by kernel.

    Raises UserError where the config demands graphs and there is no CUDA device.
    """
    on_gpu = groups.device.type == "cuda"
    if config.training.cuda_graph is True and not on_gpu:
        raise UserError('training.cuda_graph: true needs a CUDA device, and this run has none; use "auto" or false')
    eager = partial(run_schedule, chunks, config=config, groups=groups, forward_only=False)
    return MicroBatchGraph(chunks, optimizer, config, groups).run if uses_cuda_graph(config) and on_gpu else eager


class MicroBatchGraph:
    """Records the graphs when it is time, and runs the micro-batches of a step. See also `groups.select_stream`."""

    def __init__(self, chunks: nn.ModuleList, optimizer: CombinedOptimizer, config: Config, groups: Groups) -> None:
        self.chunks, self.config, self.groups = chunks, config, groups
        self.buffers = optimizer.reducer.buffers
        self.eager_steps = 0
        self.batch: Batch = {}
        self.recorded: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []
        """Graph and loss of the first micro-batch of a step, and of any other where a step has more than one."""

    def run(self, batches: list[Batch]) -> Tensor:
        """As `step.run_schedule` with gradients: returns this rank's mean loss."""
        if self.eager_steps < EAGER_STEPS:
            self.eager_steps += 1
            return run_schedule(self.chunks, batches, self.config, self.groups, forward_only=False)
        if not self.recorded:
            self._record(batches)
        losses = []
        for index, batch in enumerate(batches):
            for name, tensor in batch.items():
                self.batch[name].copy_(tensor, non_blocking=True)
            graph, loss = self.recorded[min(index, 1)]
            graph.replay()
            losses.append(loss.clone())
        for buffer in self.buffers:
            buffer.replayed(len(batches))
        return torch.stack(losses).mean()

    def _record(self, batches: list[Batch]) -> None:
        self.batch = {name: torch.empty_like(tensor, device=self.groups.device) for name, tensor in batches[0].items()}
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
        for _ in range(min(2, len(batches))):
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as the loader's that pins memory, may do as they like meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                loss = run_schedule(
                    self.chunks, [self.batch], self.config, self.groups, forward_only=False, parts=len(batches)
                )
            self.recorded.append((graph, loss))
        for buffer in self.buffers:
            buffer.record()
