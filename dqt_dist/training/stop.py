"""Stopping in good order: after SIGTERM, SIGUSR1 or Ctrl-C on any rank, all ranks finish the step, save and exit.

SLURM and cloud machines announce the end of a job by a signal, often to one process only. The ranks therefore agree
between steps (`agree` in the loop). A launcher that ends without a word counts as a signal too: nobody waits any more
for the ranks that it started.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from pathlib import Path
from types import FrameType

ANCESTORS = {"torchrun": 1, "mpirun": 1, "deepspeed": 2}
"""How many processes above a rank belong to its launcher. `deepspeed` starts a process per machine, which starts the
ranks: a signal ends the first and reaches neither of the others. srun's daemon ends its tasks itself."""


class StopSignal:
    """Remembers whether a signal came, from the moment it is made. `launcher` is that of `Launch`."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, launcher: str) -> None:
        self.received = False
        self._previous = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        process = os.getpid()
        for _ in range(ANCESTORS.get(launcher, 0)):
            process = _parent(process)
            if process > 1:
                threading.Thread(target=self._remember_exit, args=(os.pidfd_open(process),), daemon=True).start()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def _remember_exit(self, process: int) -> None:
        select.select([process], [], [])
        self.received = True

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


def _parent(process: int) -> int:
    """The process that started `process`, 0 for one outside this container."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))
