"""Stopping in good order: SIGTERM, SIGUSR1 or Ctrl-C on any rank makes all ranks save after the running step and leave.

SLURM and cloud machines announce the end of a job by a signal, often to one process only. So the ranks agree after every
step, through a one-element all-reduce on the CPU (gloo) that needs no word from the GPU.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist


class StopSignal:
    """Remembers that a signal came; `agreed` is true on every rank once any rank got one."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received = False
        self._previous = {number: signal.signal(number, self._remember) for number in self.SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agreed(self) -> bool:
        """A collective call."""
        flag = torch.tensor(int(self.received))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def ignore(self) -> None:
        """For a rank that is leaving after a stop: launchers send SIGTERM when the first rank leaves, which must not
        change the exit code of the others."""
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
