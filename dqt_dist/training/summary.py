"""summary.json: the figures of a finished run, at the end of its folder. Nothing that goes on depends on them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from dqt_dist.errors import UserError
from dqt_dist.json_files import read_json_object

SUMMARY = "summary.json"


def read_summary(run: Path) -> dict[str, Any] | None:
    """The summary in the run folder `run`, an object with the number of `steps`. None without one, and with a warning
    on standard error where the file holds none."""
    path = run / SUMMARY
    if not path.exists():
        return None
    try:
        summary = read_json_object(path, "goes on without it")
        if type(summary.get("steps")) is not int:
            raise UserError(f"{path}: has no number of steps; goes on without it")
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)
        return None
    return summary
