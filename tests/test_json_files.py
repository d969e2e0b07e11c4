"""Whatever is nested too deep for Python's json is refused by every reader as any other damage, with its file."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dqt_dist.checkpoint.folder import DamagedCheckpoint, read_manifest
from dqt_dist.config import load_config
from dqt_dist.data.indexed import Manifest
from dqt_dist.errors import UserError
from dqt_dist.export.hf_reader import HfFolder
from dqt_dist.folder_lock import LOCK_FILE, FolderLock
from dqt_dist.json_files import MOST_LEVELS, parse_json, read_json_object
from dqt_dist.training.metrics_file import METRICS_FILE, read_lines
from dqt_dist.training.summary import SUMMARY, read_summary

ROOT = Path(__file__).resolve().parents[1]
# Far beyond Python's limit, within it but beyond ours, and a value that no reader wants.
DAMAGED = {
    "too deep for Python": b"[" * 100_000,
    "deep": b"[" * 200 + b"]" * 200,
    "a list": b"[]",
    "no text": b"\xff\xfe{}",
    "cut short": b'{"steps": 4',
    "a number of 5,000 digits": b'{"steps": ' + b"1" * 5000 + b"}",
}


@pytest.fixture(params=DAMAGED.values(), ids=DAMAGED)
def content(request: pytest.FixtureRequest) -> bytes:
    return request.param


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a config": ("config.json", lambda folder: load_config(folder / "config.json")),
    "a manifest of data": ("train.json", lambda folder: Manifest.read(folder / "train.json")),
    "the manifest of a checkpoint": ("manifest.json", read_manifest),
    "config.json of an export": ("config.json", HfFolder),
}


@pytest.mark.parametrize(("name", "read"), READERS.values(), ids=READERS)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, name: str, read: Callable[[Path], object]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert isinstance(caught.value, DamagedCheckpoint) == (read is read_manifest)


def test_a_damaged_summary_is_warned_of(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / SUMMARY).write_bytes(content)
    assert read_summary(tmp_path) is None
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {tmp_path / SUMMARY}: ") and warning.count("\n") == 1
    (tmp_path / SUMMARY).write_text('{"steps": 4}')
    assert read_summary(tmp_path) == {"steps": 4} and capsys.readouterr().err == ""


def test_a_damaged_line_of_the_metrics_is_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 1, "loss": 2.0}\n' + content + b'\n{"step": 2, "loss": 1.5}\n')
    lines, damaged = read_lines(tmp_path)
    assert damaged == 1 and [line["loss"] for line in lines] == [2.0, 1.5]


def test_a_damaged_lock_names_nobody(tmp_path: Path, content: bytes) -> None:
    with FolderLock(tmp_path, "first"):
        (tmp_path / LOCK_FILE).write_bytes(content)
        with pytest.raises(UserError, match="in use by another process"), FolderLock(tmp_path, "second"):
            pass


def test_the_depth_that_can_be_read_is_the_same_for_every_caller() -> None:
    def nested(depth: int) -> str:
        return "[" * depth + "]" * depth

    def below(levels: int, text: str) -> object:
        return below(levels - 1, text) if levels else parse_json(text)

    for levels in (0, sys.getrecursionlimit() // 2):
        assert below(levels, nested(MOST_LEVELS + 1)) == json.loads(nested(MOST_LEVELS + 1))
        with pytest.raises(ValueError, match="nested too deeply"):
            below(levels, nested(MOST_LEVELS + 2))
    # Control: without a bound Python's own is the limit.
    assert parse_json(nested(MOST_LEVELS + 2), most_levels=None)


def test_the_place_in_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(UserError) as caught:
        read_json_object(path, "write it again")
    assert str(caught.value) == f"{path}: not JSON: Expecting value at line 2, column 7; write it again"


def test_nothing_else_reads_json() -> None:
    """But for the watchdog, which reads what another rank of the same run has just written."""
    readers = {
        str(path.relative_to(ROOT))
        for folder in ("dqt_dist", "tools", "launchers")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"json\.loads?\(|\.(raw_)?decode\(text\)", path.read_text(encoding="utf-8"))
    }
    assert readers == {"dqt_dist/json_files.py", "dqt_dist/training/watchdog.py"}
