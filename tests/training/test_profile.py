"""logging.profile_steps: a trace of each rank with the steps of the window, and no others."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from dqt_dist.training.profile import StepProfiler
from tests.training.conftest import Train


def spans(trace: Path) -> list[str]:
    """The spans of steps, in the order of time."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event for event in events if re.fullmatch(r"step \d+", event.get("name", ""))]
    return [event["name"] for event in sorted(steps, key=lambda event: event["ts"])]


def operations(trace: Path) -> set[str]:
    return {event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}


def steps_of(profiler: StepProfiler, numbers: range) -> None:
    for number in numbers:
        with profiler.step(number):
            torch.ones(3, 4) @ torch.ones(4, 5)


def test_every_rank_leaves_a_trace_of_the_window(train: Train, tmp_path: Path) -> None:
    window = ("training.steps=5", "logging.profile_steps=[2,3]", "training.sample_prompt=null")
    done = train(*window, "parallel.pipeline=2", processes=2)
    assert done.returncode == 0, done.stderr
    traces = tmp_path / "run" / "traces"
    names = [f"steps_00000002_to_00000003_rank_{rank:05d}.json.gz" for rank in (0, 1)]
    assert sorted(path.name for path in traces.iterdir()) == names
    assert f"steps 2 to 3 are profiled: {traces}/steps_00000002_to_00000003_rank_*.json.gz" in done.stdout
    for name in names:
        assert spans(traces / name) == ["step 2", "step 3"]
        assert "aten::mm" in operations(traces / name)


def test_a_window_that_is_left_early_or_entered_late_has_the_steps_that_were_made(tmp_path: Path) -> None:
    profiler = StepProfiler((4, 6), tmp_path, 3, torch.device("cpu"))
    steps_of(profiler, range(5, 6))  # resumed at step 4
    assert not profiler.is_complete
    assert str(profiler.write()).startswith("steps 5 to 5 are profiled")
    (trace,) = (tmp_path / "traces").iterdir()
    assert trace.name == "steps_00000005_to_00000005_rank_00003.json.gz" and spans(trace) == ["step 5"]


def test_without_a_window_nothing_is_profiled(tmp_path: Path) -> None:
    profiler = StepProfiler(None, tmp_path, 0, torch.device("cpu"))
    steps_of(profiler, range(1, 3))
    assert profiler.running is None and not profiler.is_complete


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "traces").touch()
    profiler = StepProfiler((1, 1), tmp_path, 0, torch.device("cpu"))
    steps_of(profiler, range(1, 3))
    assert profiler.is_complete
    assert profiler.write() is None
    assert capsys.readouterr().err.startswith(f"warning: the trace {tmp_path}/traces/steps_00000001_to_00000001")
