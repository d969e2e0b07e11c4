"""Forward and backward of a micro-batch as one CUDA graph (training.cuda_graph).

Python launches about two thousand kernels per micro-batch. When the GPU finishes the kernels sooner than Python
launches them, the GPU waits. This is always so for models of some hundred million weights, and on a slow processor also
for a model of a billion weights. A graph is launched as a whole and runs the same kernels on the same addresses.
Results equal those of `step.run_schedule`, bit for bit.

    step 1, 2      no graph: kernels are compiled and libraries are initialised
    step 3         two graphs of one micro-batch each are recorded. The first, for the first micro-batch of a step,
                   writes gradients. The second, for all other micro-batches, adds to these gradients.
    step 3 and on  batches are copied to the memory that the graphs read, the graphs run, and the gradient buffers hold
                   the sums at the recorded addresses

A graph holds addresses and numbers. Codes and parameters therefore keep their addresses and change in place. The
optimizer runs outside the graphs, because step number and learning rate change. Activations and gradients stay
allocated between steps.
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

# Steps before the recording. The first compiles all kernels. The second runs as the recording will, so that an error
# shows here and not during the recording.
EAGER_STEPS = 2


def choose_forward_backward(
    model_chunks: nn.ModuleList, optimizer: CombinedOptimizer, config: Config, groups: Groups
) -> ForwardBackward:
    """The function that runs the micro-batches of a step: as CUDA graphs or kernel by kernel, as the config says.

    Raises UserError when the config requires graphs and there is no CUDA device.
    """
    on_gpu = groups.device.type == "cuda"
    if config.training.cuda_graph is True and not on_gpu:
        raise UserError('training.cuda_graph: true needs a CUDA device, and this run has none; use "auto" or false')
    eager = partial(run_schedule, model_chunks, config=config, groups=groups, forward_only=False)
    return MicroBatchGraph(model_chunks, optimizer, config, groups).run if uses_cuda_graph(config) and on_gpu else eager


class MicroBatchGraph:
    """Runs the micro-batches of a step, and records the graphs in step 3. See also `groups.select_stream`."""

    def __init__(
        self, model_chunks: nn.ModuleList, optimizer: CombinedOptimizer, config: Config, groups: Groups
    ) -> None:
        self.model_chunks, self.config, self.groups = model_chunks, config, groups
        self.buffers = optimizer.reducer.buffers
        self.eager_steps = 0
        self.batch: Batch = {}
        self.recorded: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []
        """(graph, loss) of the first micro-batch of a step and, where a step has several, of every other one."""

    def run(self, batches: list[Batch]) -> Tensor:
        """Does what `step.run_schedule` does with forward_only=False. Returns this rank's mean loss."""
        if self.eager_steps < EAGER_STEPS:
            self.eager_steps += 1
            return run_schedule(self.model_chunks, batches, self.config, self.groups, forward_only=False)
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
            # "thread_local" allows CUDA calls of other threads during the recording, such as the loader's thread that
            # pins memory.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                loss = run_schedule(
                    self.model_chunks,
                    [self.batch],
                    self.config,
                    self.groups,
                    forward_only=False,
                    loss_divisor=len(batches),
                )
            self.recorded.append((graph, loss))
        for buffer in self.buffers:
            buffer.record()
