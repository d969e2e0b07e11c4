"""Notices a rank that fails, vanishes or stands still, says which one, and ends the run on every rank.

A collective waits for a rank that never comes, and none of the waiting ranks knows for whom. So each rank has two
threads that depend on no collective:

    talk     once a second: writes this rank's step and phase to the store at which the ranks met, reads the verdict,
             and reads what the next rank has written
    watch    looks at clocks only, so that nothing can hold it up; carries the verdict out

    what                                      is noticed by                    after
    an exception                              the rank itself                  0 s
    no progress                               the rank itself                  the timeout of its phase
    a rank stopped, or gone without a word    the rank before it in the ring   the timeout of its phase, or when the
                                                                               connection to it breaks
    the store of rank 0 does not answer       every rank                       one of the above

The first rank to notice anything claims the verdict, listens for SILENCE seconds to all ranks, and publishes one text
that names those that are silent, behind, or failed. This rank prints it. Every rank then ends, with exit code 1 at
latest GRACE seconds later, whatever its main thread waits for.

Clocks count only time in which their own process ran: a job that was suspended as a whole goes on afterwards.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from dqt_dist.config import Config
from dqt_dist.errors import RUN_ERROR_EXIT_CODE, SpokenError
from dqt_dist.launch import Launch

INTERVAL = 1.0
"""Seconds between two beats of a rank."""
SILENCE = 5.0
"""Seconds without a beat after which a rank counts as silent, once there is a reason to ask."""
GRACE = 10.0
"""Seconds after the verdict in which a rank that failed may end by itself."""
LAST_WORD = 3.0
"""The same for a rank that waits for others. Rank 0 keeps the store, and the others have to read the verdict in it."""
MOST_NAMED = 8
"""Ranks that a message names one by one."""
MOST_LETTERS = 300
"""Of the text of an error that is not ours."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    number: int
    """Of this beat; a rank whose number stands still is silent."""
    marks: int
    """Phases begun so far. All ranks go through the same phases, so the smallest number is the furthest behind."""
    step: int
    phase: str
    seconds: float
    """In this phase."""
    limit: float
    """Longest allowed duration of this phase, in seconds."""

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}, for {self.seconds:.0f} s"


@dataclass(frozen=True)
class Verdict:
    text: str
    silent_or_failed: list[int]
    """Ranks whose fault it is, as far as can be seen."""
    with_stacks: bool
    """Every rank writes down where its threads stand: for a run that stood still."""


class Watchdog:
    """The two threads of this rank. `mark` says what the main thread does now; `close` ends the threads."""

    def __init__(self, config: Config, launch: Launch) -> None:
        self.launch = launch
        self.startup_timeout = config.training.startup_timeout_seconds
        self.step_timeout = config.training.step_timeout_seconds
        self.stacks = Path(config.checkpoint.dir) / "stacks"
        self.verdict: Verdict | None = None
        self._reason: str | None = None
        """Why this rank asks for a verdict."""
        self._failed = False
        self._closed, self._decided, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._clock = 0.0
        self._heard = 0.0
        """When the store last answered."""
        self._number = 0
        self._now = (0, 0, "start-up", self.startup_timeout, 0.0)
        self._next: tuple[Beat | None, float] = (None, 0.0)
        """The last new beat of the next rank, and when it came."""
        # A connection of its own: the main thread holds the lock of its connection while it waits for other ranks.
        store = dist.distributed_c10d._get_default_store()
        self._store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._talk, self._watch)]
        for thread in self._threads:
            thread.start()

    def mark(self, phase: str, step: int, *, slow: bool = False) -> None:
        """The main thread begins `phase` of `step`. A `slow` phase has the timeout of the start-up."""
        limit = self.startup_timeout if slow else self.step_timeout
        self._now = (self._now[0] + 1, step, phase, limit, self._clock)

    def failed(self, error: Exception) -> bool:
        """The main thread cannot go on. Returns, after the verdict, whether this rank is the one that failed.

        An error of a collective is only the consequence when another rank is gone.
        """
        self._failed = True
        if self.verdict is None:
            text = (
                str(error) if isinstance(error, SpokenError) else f"{type(error).__name__}: {str(error)[:MOST_LETTERS]}"
            )
            self._ask(f"rank {self.launch.rank} failed in {self._beat()}: {text}")
            self._decided.wait(6 * SILENCE)
        return self.verdict is None or self.launch.rank in self.verdict.silent_or_failed

    def close(self) -> None:
        """The main thread needs nobody any more."""
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2 * INTERVAL)

    # ---- the thread that talks ----

    def _talk(self) -> None:
        try:
            while not self._closed.is_set():
                self._exchange()
                if self._reason is not None and self.verdict is None and self._store.add("claims", 1) == 1:
                    self._investigate(self._reason)
                self._wake.wait(INTERVAL)
                self._wake.clear()
        except RuntimeError:  # the store is gone: all errors of a store are RuntimeErrors
            if not self._closed.is_set() and self.verdict is None:
                self._decide_alone(connected=False)

    def _exchange(self) -> None:
        """Writes this rank's beat, reads the verdict and the next rank's beat."""
        self._store.set(f"beat/{self.launch.rank}", json.dumps(asdict(self._beat())))
        if self.verdict is None and self._store.check(["verdict"]):
            self._accept(Verdict(**json.loads(self._store.get("verdict"))))
        beat = self._read((self.launch.rank + 1) % self.launch.world_size)
        if beat is not None and beat != self._next[0]:
            self._next = (beat, self._clock)
        self._heard = self._clock

    def _read(self, rank: int) -> Beat | None:
        key = f"beat/{rank}"
        return Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _investigate(self, reason: str) -> None:
        ranks = range(self.launch.world_size)
        before = [self._read(rank) for rank in ranks]
        deadline = time.monotonic() + SILENCE
        while time.monotonic() < deadline:
            self._exchange()
            time.sleep(INTERVAL)
        after = [self._read(rank) for rank in ranks]
        silent = [rank for rank in ranks if before[rank] == after[rank] and rank != self.launch.rank]
        found = verdict(reason, after, silent, self.launch.rank if self._failed else None, self.stacks)
        self._store.set("verdict", json.dumps(asdict(found)))
        self._accept(found)
        self._print(found)

    # ---- the thread that watches ----

    def _watch(self) -> None:
        last, ends_at = time.monotonic(), math.inf
        asked_at = math.inf
        while not self._closed.wait(INTERVAL / 4):
            now = time.monotonic()
            # At most two intervals are counted: in what is beyond, this process did not run.
            self._clock += min(now - last, 2 * INTERVAL)
            last = now
            if self.verdict is not None:
                if ends_at == math.inf:
                    ends_at = self._clock + (GRACE if self._failed else LAST_WORD)
                    self._write_stacks()
                if self._clock > ends_at:
                    sys.stderr.flush()
                    os._exit(RUN_ERROR_EXIT_CODE)
            elif self._reason is not None:
                asked_at = min(asked_at, self._clock)
                connected = self._clock - self._heard < SILENCE
                if self._clock > asked_at + (4 * SILENCE if connected else SILENCE):
                    self._decide_alone(connected)
            else:
                self._look()

    def _look(self) -> None:
        _, step, _, limit, since = self._now
        if self._clock - since > limit:
            self._ask(f"no progress in step {step} for {self._named(limit)}")
        beat, came = self._next
        if beat is not None and self._clock - came > beat.limit:
            next_rank = (self.launch.rank + 1) % self.launch.world_size
            self._ask(f"no word of rank {next_rank} for {self._named(beat.limit)}")

    def _named(self, limit: float) -> str:
        name = "step_timeout_seconds" if limit == self.step_timeout else "startup_timeout_seconds"
        return f"{limit:g} s, training.{name}"

    def _write_stacks(self) -> None:
        if self.verdict is not None and self.verdict.with_stacks:
            self.stacks.mkdir(parents=True, exist_ok=True)
            with open(self.stacks / f"rank_{self.launch.rank}.txt", "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)

    # ---- both ----

    def _beat(self) -> Beat:
        self._number += 1
        marks, step, phase, limit, since = self._now
        return Beat(self._number, marks, step, phase, self._clock - since, limit)

    def _ask(self, reason: str) -> None:
        self._reason = reason
        self._wake.set()

    def _accept(self, found: Verdict) -> None:
        self.verdict = found
        self._decided.set()

    def _decide_alone(self, connected: bool) -> None:
        """The verdict where none comes. Then no rank hears of the others, and one of each machine prints."""
        text = "no answer from the rank that asked the others"  # it is gone as well
        if not connected:
            store = f"{self.launch.master_address}:{self.launch.master_port}"
            text = f"no answer from rank 0, or from the launcher that keeps the store of the ranks, at {store}"
        if self._reason is not None:
            text += f"; {self._reason}"
        self._accept(Verdict(text, [0], with_stacks=not self._failed))
        if self.launch.local_rank == min(1, self.launch.local_world_size - 1):
            self._print(self.verdict)

    def _print(self, found: Verdict | None) -> None:
        if found is not None:
            print(f"\nerror: {found.text}", file=sys.stderr, flush=True)  # below the progress bar


def verdict(reason: str, beats: list[Beat | None], silent: list[int], failed: int | None, stacks: Path) -> Verdict:
    """The verdict for `reason`, given the last beat of every rank, the silent ranks, and the rank that failed if one
    asked because it failed."""
    if silent:
        parts = [f"rank {rank} (last heard: {beats[rank] or 'never'})" for rank in silent]
        text = f"no answer from {_listed(parts)}; {reason}"
        return Verdict(text, silent, with_stacks=failed is None)
    if failed is not None:
        return Verdict(reason, [failed], with_stacks=False)
    marks = [beat.marks if beat else 0 for beat in beats]
    behind = [rank for rank, count in enumerate(marks) if count == min(marks)]
    if len(behind) == len(beats):
        text = f"{reason}; all ranks stand at {beats[0]}"
    else:
        parts = [f"rank {rank} ({beats[rank]})" for rank in behind]
        ahead = next(beat for beat in beats if beat and beat.marks == max(marks))
        text = f"{reason}; behind: {_listed(parts)}; the others: {ahead}"
    return Verdict(f"{text}; where they stand: {stacks}", behind, with_stacks=True)


def _listed(parts: list[str]) -> str:
    more = len(parts) - MOST_NAMED
    return ", ".join(parts[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
