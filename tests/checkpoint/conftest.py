"""A run folder with checkpoints, of which tests damage copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.states import write
from tests.distributed import run_distributed


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 5 and 10 by two ranks."""
    folder = tmp_path_factory.mktemp("run")
    run_distributed(write, 2, str(folder), [5, 10])
    return folder
