"""logging.wandb_project: the curves of metrics.jsonl in an offline run of wandb, and a refusal without the package."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from dqt_dist.errors import EXIT_CODE
from tests.training.conftest import Train

SETTINGS = ("training.steps=2", "training.sample_prompt=null", "logging.wandb_project=dqt")


def records(data: bytes) -> Iterator[bytes]:
    """The records of wandb's file, a log of LevelDB: blocks of 32 KiB, in them checksum, length, kind, bytes."""
    place, record = 7, b""
    while place + 7 <= len(data):
        left_of_block = 2**15 - place % 2**15
        if left_of_block < 7:
            place += left_of_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield record
            record = b""


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb: pip install 'dqt_dist[wandb]'")
def test_an_offline_run_has_the_curves(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    done = train(*SETTINGS, processes=2)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    points = []
    for data in records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            points.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == [line["step"] for line in lines]
    for point, line in zip(points, lines, strict=True):
        found = {name.split("/")[-1]: value for name, value in point.items() if not name.startswith("_")}
        assert found == line


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_without_the_package_a_run_is_refused_before_it_trains(train: Train, tmp_path: Path) -> None:
    done = train(*SETTINGS)
    assert done.returncode == EXIT_CODE and "Traceback" not in done.stderr
    assert "error: logging.wandb_project: the package wandb is not installed; install it with: pip" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
