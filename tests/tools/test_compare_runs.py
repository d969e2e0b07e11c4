"""tools/compare_runs.py: it draws what metrics.jsonl holds, and prints what the configs differ in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dqt_dist.command_line import drawing
from dqt_dist.commands import compare_runs
from dqt_dist.errors import EXIT_CODE

STEPS = (1, 10, 20, 30)
TOKENS_PER_STEP, SPEED = 1000, 500.0


def step_line(step: int, loss: float) -> dict[str, Any]:
    line = {"step": step, "loss": loss, "tokens": step * TOKENS_PER_STEP, "tokens_per_s": SPEED}
    return line | {"peak_memory_bytes": 2**30, "flip_rate": 0.1 if step < 30 else 0.0}


def write_run(folder: Path, rate: float, steps: tuple[int, ...] = STEPS, extra: str = "", **config: Any) -> Path:
    folder.mkdir()
    lines = [json.dumps(step_line(step, 6.0 - step * rate)) for step in steps]
    lines += [json.dumps({"step": 15, "valid_loss": 5.5}), json.dumps({"step": 30, "save_seconds": 1.0})]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + extra)
    values = {"optimizer": {"learning_rate": rate}, "logging": {"interval": 10}, "checkpoint": {"dir": str(folder)}}
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def test_it_draws_every_run_and_prints_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = write_run(tmp_path / "a", 0.01, data={"train": [{"path": "x"}]})
    second = write_run(tmp_path / "b", 0.02, data={"train": [{"path": "x"}, {"path": "y"}]})
    picture = tmp_path / "both.png"
    assert compare_runs.main([str(first), f"fast={second}", "--output", str(picture)]) == 0
    out, errors = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        ["differs", str(first), "fast"],
        ["optimizer.learning_rate", "0.01", "0.02"],
        ["data.train.1.path", "-", '"y"'],
        ["drew", str(picture)],
    ]
    assert errors == "" and picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "both.png"}


def test_the_panels_hold_the_numbers_of_the_lines(tmp_path: Path) -> None:
    found = compare_runs.read(str(write_run(tmp_path / "a", 0.01)))
    figure = compare_runs.draw(drawing("--output", tmp_path / "x.png"), [found], "title")
    by_tokens, by_time, flips, speed, memory, _ = figure.axes
    millions = np.array(STEPS) * TOKENS_PER_STEP / 1e6
    losses = 6.0 - np.array(STEPS) * 0.01
    hours = np.array(STEPS) * TOKENS_PER_STEP / SPEED / 3600
    for panel, x in ((by_tokens, millions), (by_time, hours)):
        np.testing.assert_allclose(panel.lines[0].get_xydata(), np.column_stack([x, losses]))
        # Step 15 is not logged; it lies in the middle of steps 10 and 20.
        np.testing.assert_allclose(panel.lines[1].get_xydata(), [[(x[1] + x[2]) / 2, 5.5]])
    np.testing.assert_array_equal(flips.lines[0].get_ydata(), [0.1, 0.1, 0.1, np.nan])
    np.testing.assert_array_equal(speed.lines[0].get_ydata(), [SPEED] * 4)
    np.testing.assert_array_equal(memory.lines[0].get_ydata(), [1.0] * 4)


def test_missing_and_damaged_lines_are_warnings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    holes = write_run(tmp_path / "holes", 0.01, steps=(1, 10, 40, 50, 90), extra='[1]\n{"step": 100, "loss": 4.\n')
    no_config = write_run(tmp_path / "no_config", 0.01)
    (no_config / "config.json").unlink()
    no_memory = write_run(tmp_path / "no_memory", 0.01, extra='{"step": 40, "loss": "low"}\n')
    arguments = [str(holes), str(no_config), str(no_memory), "--output", str(tmp_path / "x.png")]
    assert compare_runs.main(arguments) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [
        f"compare_runs: warning: 2 lines of {holes}/metrics.jsonl are damaged and left out",
        f"compare_runs: warning: {holes}/metrics.jsonl: no line between steps 10 to 40 and 1 more, "
        "logging.interval is 10",
        f"compare_runs: warning: {no_config}/config.json: cannot be read and is not compared: [Errno 2] No such file "
        f"or directory: '{no_config}/config.json'",
    ]


def test_bad_input_is_one_message_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = write_run(tmp_path / "good", 0.01)
    empty = write_run(tmp_path / "empty", 0.01)
    (empty / "metrics.jsonl").write_text('{"step": 5, "valid_loss": 1.0}\n')
    cases = {
        (str(tmp_path / "none"),): f"{tmp_path}/none: holds no metrics.jsonl; give the folder",
        (str(good), str(empty)): f"{empty}/metrics.jsonl: holds no logged step",
        (str(good), "--output", "x.svg"): "--output x.svg: the name must end in .png",
        (str(good), "--output", f"{tmp_path}/no/x.png"): f"the folder {tmp_path}/no does not exist",
    }
    for arguments, message in cases.items():
        assert compare_runs.main([*arguments]) == EXIT_CODE
        out, errors = capsys.readouterr()
        assert out == "" and len(errors.splitlines()) == 1 and message in errors
