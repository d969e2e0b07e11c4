"""metrics.jsonl: one JSON object a line, each with its step. The one place that reads it.

    a logged step    step, loss, tokens, tokens_per_s, learning rates, flip_rate ...      (Trainer._log)
    a validation     step, valid_loss, valid_perplexity, valid_loss.NAME of data.valid_texts
    a save           step, save_seconds, save_bytes ...

A run that was killed may leave a part of a line, and a disk that was full a hole. Such a line is no line: the readers
say how many there are and go on with the others.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dqt_dist.json_files import parse_json

METRICS_FILE = "metrics.jsonl"

Line = dict[str, Any]


def read_lines(run: Path) -> tuple[list[Line], int]:
    """The whole lines of a run folder's metrics.jsonl, and the number of damaged ones; none where the file is gone."""
    path = run / METRICS_FILE
    if not path.exists():
        return [], 0
    found = [_parsed(line) for line in path.read_text(errors="replace").splitlines()]
    return [line for line in found if line is not None], found.count(None)


def _parsed(text: str) -> Line | None:
    try:
        values = parse_json(text)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def number(line: Line, name: str) -> float:
    """The value of `name`; NaN, which a plot leaves out, where the line has no number there."""
    value = line.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
