"""Ranks of a run as processes of their own (forked.py) that a test can signal, kill and wait for.

They are what a user starts by hand on one machine: launchers/pretrain.py with the variables of `env://`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests import forked
from tests.training.conftest import ROOT, environment

DEADLINE_SECONDS = 90.0
"""More than anything here takes on a machine that is busy with other tests."""


class Ranks:
    """The processes of one run. Use it in a `with` statement, which kills what is left.

    Each calls `prepare`, which can be pickled, before it starts the trainer.
    """

    def __init__(
        self,
        config_file: Path,
        log_folder: Path,
        *overrides: str,
        num: int = 2,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        log_folder.mkdir(parents=True, exist_ok=True)
        arguments = [part for override in overrides for part in ("--set", override)]
        argv = [str(ROOT / "launchers/pretrain.py"), "--config", str(config_file), *arguments]
        self.logs = [log_folder / f"rank_{rank}.log" for rank in range(num)]
        self.processes = [
            forked.start(argv, environment() | variables, log, log, prepare)
            for variables, log in zip(forked.ranks_environment(num), self.logs, strict=True)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def signal(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Returns when `condition()` is true. No rank may end before."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert all(process.is_alive() for process in self.processes) and time.monotonic() < deadline, self.output()
            time.sleep(0.002)

    def exit_code(self, rank: int) -> int | None:
        """The exit code of a rank when it has ended, None for one that does not end."""
        self.processes[rank].join(DEADLINE_SECONDS)
        return self.processes[rank].exitcode

    def exit_codes(self) -> list[int | None]:
        return [self.exit_code(rank) for rank in range(len(self.processes))]

    def output(self) -> str:
        """What all ranks have printed."""
        return "\n".join(log.read_text() for log in self.logs if log.exists())


def steps_logged(run: Path) -> list[int]:
    """Steps of the lines of metrics.jsonl that are losses."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n") and '"loss"' in line]
