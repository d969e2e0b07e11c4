"""A window of steps under torch.profiler: what ran when, on the CPU and on the GPU, in one trace per rank.

    traces/steps_00000010_to_00000012_rank_00003.json.gz      for https://ui.perfetto.dev or chrome://tracing

`logging.profile_steps` names the window. The profiler runs from the beginning of its first step to the end of its last
one, so reading batches, logging and what else stands between steps is in the trace too. Each step is a span "step N".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dqt_dist.command_line import side_matter

TRACES_FOLDER = "traces"


class StepProfiler:
    """Profiles the steps of `window`, its first and last one, on this rank; does nothing outside of them."""

    def __init__(self, window: tuple[int, int] | None, run: Path, rank: int, device: torch.device) -> None:
        self.window = window or (0, 0)
        self.folder = run / TRACES_FOLDER
        self.rank, self.device = rank, device
        self.running: profile | None = None
        self.first_step = self.last_step = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The block is step `number`. A run that is resumed inside the window profiles what is left of it."""
        first, last = self.window
        if not first <= number <= last:
            yield
            return
        if self.running is None:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.running, self.first_step = profile(activities=activities, record_shapes=True), number
            self.running.start()
        self.last_step = number
        with record_function(f"step {number}"):
            yield

    @property
    def is_complete(self) -> bool:
        """Whether the last step of the window is done and its trace is not written."""
        return self.running is not None and self.last_step == self.window[1]

    def write(self) -> str | None:
        """Writes this rank's trace of the steps so far, and says where all traces are.

        A trace that cannot be written is a warning, and the result None: it is not worth a run.
        """
        assert self.running is not None
        stopped, self.running = self.running, None
        steps = f"steps_{self.first_step:08d}_to_{self.last_step:08d}"
        path = self.folder / f"{steps}_rank_{self.rank:05d}.json.gz"
        with side_matter(f"the trace {path}"):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            stopped.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}")  # torch compresses what ends in .gz
            stopped.export_chrome_trace(str(partial))
            partial.rename(path)
            return (
                f"steps {self.first_step} to {self.last_step} are profiled: {self.folder}/{steps}_rank_*.json.gz, a "
                f"trace of each rank for https://ui.perfetto.dev"
            )
        return None
