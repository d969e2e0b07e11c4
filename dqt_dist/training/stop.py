"""Stopping in good order: after SIGTERM, SIGUSR1 or Ctrl-C on any rank, all ranks finish the step, save and exit.

SLURM and cloud machines announce the end of a job by a signal, often to one process only. The ranks therefore agree
after every step, through a one-element all-reduce on the CPU (gloo) that does not wait for the GPU.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist


class StopSignal:
    """Remembers whether a signal came. `agreed` is true on every rank once any rank got a signal."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received = False
        self._previous = {number: signal.signal(number, self._remember) for number in self.SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agreed(self) -> bool:
        """Whether any rank got a signal. A collective call."""
        flag = torch.tensor(int(self.received))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def ignore(self) -> None:
        """Ignores signals from now on. For a rank that exits after a stop.

        Launchers send SIGTERM when the first rank exits, and this signal must not change the exit code of the others.
        """
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Restores the signal handlers from before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
