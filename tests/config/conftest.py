"""A small config file for each test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.config.files import small


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(small()))
    return path
