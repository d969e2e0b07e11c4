"""The progress of long work: a live line on a terminal, whole lines elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from dqt_dist.progress_line import ProgressLine

ROOT = Path(__file__).parent.parent
WORK = """
import time
from dqt_dist import progress_line
progress_line.SECONDS_BETWEEN_LINES = 0.05
line = progress_line.ProgressLine(desc="work", total=4, unit=" parts")
for part in range(4):
    time.sleep(0.1)
    line.update(1)
    line.say(f"part {part}")
line.close()
"""


def test_a_terminal_has_one_live_line() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))  # a new one has no columns
    done = subprocess.run([sys.executable, "-c", WORK], cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, timeout=60)
    shown = os.read(ours, 2**16).decode()
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0 and done.stdout.split() == b"part 0 part 1 part 2 part 3".split()
    assert shown.count("work:") >= 4 and "\r" in shown
    # What is left of the line is cleared.
    assert shown.rsplit("\r", 2)[1].strip() == ""


def test_a_file_has_whole_lines_now_and_then() -> None:
    done = subprocess.run([sys.executable, "-c", WORK], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines() == [f"part {part}" for part in range(4)]
    assert "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert 1 <= len(lines) <= 4 and all(line.startswith("work: ") for line in lines)
    assert " of 4 parts, 00:00, " in lines[0]


def test_quick_work_leaves_no_line_in_a_file(capsys: pytest.CaptureFixture) -> None:
    for _ in ProgressLine(range(1000), "work"):
        pass
    assert capsys.readouterr() == ("", "")


def test_every_progress_is_this_one() -> None:
    """Negative control: the module itself is found."""
    sources = [path for folder in ("dqt_dist", "tools", "launchers") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in sources if "tqdm import" in path.read_text()] == ["progress_line.py"]
