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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dqt_dist.errors import STOPPED_EXIT_CODE

ANCESTORS = {"torchrun": 1, "mpirun": 1, "deepspeed": 2}
"""How many processes above a rank belong to its launcher. `deepspeed` starts a process per machine, which starts the
ranks: a signal ends the first and reaches neither of the others. srun's daemon ends its tasks itself."""

PATIENCE = 3.0
"""Seconds after a signal in which the ranks may still meet and agree. Ranks that start together differ by less."""


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

    @contextmanager
    def while_ranks_meet(self) -> Iterator[None]:
        """In this block a signal ends the process with STOPPED_EXIT_CODE, unless the block ends soon.

        A rank that waits for others to start does so inside torch, where no handler of Python's runs, for up to the
        timeout of the start-up. There is nobody yet to agree with, and nothing to save.
        """
        has_met = threading.Event()
        reader, writer = os.pipe2(os.O_NONBLOCK)
        previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to at once, whatever code runs

        def watch() -> None:
            while not self.received and not select.select([reader], [], [], 0.2)[0]:
                pass
            if not has_met.wait(PATIENCE):
                print("stopped by a signal before the ranks had met; there was nothing to save", flush=True)
                os._exit(STOPPED_EXIT_CODE)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            has_met.set()
            os.write(writer, b"\0")
            watcher.join()
            signal.set_wakeup_fd(previous)
            os.close(reader)
            os.close(writer)

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
