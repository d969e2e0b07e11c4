"""Executes a suspicious step again and compares: equal bits mean that the data did it, other bits name a rank.

Everything a step computes is a function of state, batch and logical coordinates, and a step that is skipped leaves the
weights as they were. So forward and backward can be executed again without anything having been kept but the batch. Of
the first execution, digests are compared with those of the second, 8 bytes each:

    loss                 of this rank
    gradient of M        what this rank has summed over its micro-batches, taken when it is sent to its owners
    mean gradient of M   what this rank owns of the mean over data-parallel ranks

The first two tell which rank computed something else. Where only means differ, a transfer did, or the memory that
received it. Tensor- and pipeline-parallel ranks exchange activations, so one faulty rank makes those of its copy of the
model differ too. A fault that repeats itself (a bit that is stuck) looks like data.

A digest is the sum of the words, so one changed word always shows. It reads each gradient once a step. The update of
the weights is not executed again: a difference there is for `replica_check.py`. After that check has failed, the state
before the fault is gone. Then the last batch is executed twice from the present state, which finds a rank that
computes wrongly again and again.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.errors import RunError
from dqt_dist.lowbit.gradient_buffer import checksum
from dqt_dist.optim.engine import CombinedOptimizer
from dqt_dist.parallel.groups import Groups
from dqt_dist.training.step import Batch, ForwardBackward

SHOWN = 6
"""Names of a rank in the message."""


class Replay:
    """Runs forward and backward of each step, and again where the step is skipped. Built once per run."""

    def __init__(
        self,
        forward_backward: ForwardBackward,
        model_chunks: nn.ModuleList,
        optimizer: CombinedOptimizer,
        groups: Groups,
    ) -> None:
        self.forward_backward, self.model_chunks = forward_backward, model_chunks
        self.optimizer, self.groups = optimizer, groups
        self.buffers = optimizer.reducer.buffers
        self.batches: list[Batch] = []
        self.repeated = False
        """Whether the last step was executed again, with the same bits."""
        for buffer in self.buffers:
            buffer.digest = torch.zeros((), dtype=torch.int64, device=groups.device)
        optimizer.before_update = self._before_update

    def run(self, batches: list[Batch]) -> Tensor:
        """Forward and backward of a step: a ForwardBackward."""
        self.batches, self.repeated = batches, False
        for buffer in self.buffers:
            assert buffer.digest is not None
            buffer.digest.zero_()
        return self.forward_backward(batches)

    def _before_update(self, clip: Tensor) -> None:
        """Called by the optimizer when the means of the gradients are known. Waits for the device."""
        if clip > 0:
            return
        found = self._differing(self._digests(self.optimizer.loss))
        if message := fault(found):
            assert self.optimizer.rates is not None
            raise RunError(
                f"step {self.optimizer.rates.step} was skipped, and executed again it gave other bits: {message}\n"
                f"Nothing was saved after it; take out the machine of that rank and start again with --resume auto"
            )
        self.repeated = True

    def after_failed_replica_check(self) -> str:
        """What two executions of the last batch from the present state say. A collective call."""
        self.model_chunks.train()
        message = fault(self._differing(self._execute()))
        if message:
            return f"The last batch was executed twice from the present state, and gave other bits: {message}"
        return (
            "The last batch was executed twice from the present state, with the same bits on every rank: no rank "
            "computes wrongly all the time, the fault came once, in a memory, a transfer or an update"
        )

    def _execute(self) -> Tensor:
        """The digests of another execution of the batch."""
        loss = self.run(self.batches)
        self.optimizer.reducer.finish()
        return self._digests(loss)

    def _digests(self, loss: Tensor) -> Tensor:
        """int64, in the order of `_names`."""
        of_buffers = []
        for buffer in self.buffers:
            assert buffer.digest is not None and buffer.mean is not None
            of_buffers += [buffer.digest.clone(), checksum(buffer.mean)]
        return torch.stack([checksum(loss), *of_buffers])

    def _names(self) -> list[str]:
        return ["loss"] + [f"{what} of {b.name}" for b in self.buffers for what in ("gradient", "mean gradient")]

    def _differing(self, first: Tensor) -> list[list[str]]:
        """For each rank, the names of what another execution changes. A collective call.

        The means of the first execution are dropped; those of the other one take their place.
        """
        for buffer in self.buffers:
            buffer.take()
        differs = (first != self._execute()).tolist()
        own = [name for name, differ in zip(self._names(), differs, strict=True) if differ]
        of_ranks: list[list[str]] = [[]] * self.groups.world.size()
        dist.all_gather_object(of_ranks, own, group=self.groups.world)
        return of_ranks


def fault(differing: list[list[str]]) -> str:
    """Says which ranks differ, and in what; empty when none does. `differing` has the names that differ for each rank.

    Means are results of the gradients of all ranks. They are named when nothing else differs.
    """
    computed = [[name for name in names if not name.startswith("mean ")] for names in differing]
    shown = computed if any(computed) else differing
    ranks = [rank for rank, names in enumerate(shown) if names]
    if not ranks:
        return ""
    where = "computed" if any(computed) else "received from other ranks"
    lines = [f"rank(s) {', '.join(map(str, ranks))} {where} something else, so hardware is at fault and not the data"]
    for rank in ranks:
        more = f" and {len(shown[rank]) - SHOWN} more" if len(shown[rank]) > SHOWN else ""
        lines.append(f"rank {rank}: {', '.join(shown[rank][:SHOWN])}{more}")
    return "\n".join(lines)
