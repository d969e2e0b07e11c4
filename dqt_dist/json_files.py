"""JSON that somebody else may have written, changed or cut short: a user, another program, a crash.

Python's json raises RecursionError for what is nested too deep, at a depth that depends on the caller's own. Here this
is a ValueError as all the rest, so every reader of such a text or file begins here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dqt_dist.errors import UserError

MOST_LEVELS = 100
"""Objects and lists inside one another; no file of this project has half of it."""

_DECODER = json.JSONDecoder()


def parse_json(text: str, decoder: json.JSONDecoder = _DECODER, most_levels: int | None = MOST_LEVELS) -> Any:
    """The value that `text` stands for. Raises JSONDecodeError for what is not JSON, ValueError for what is nested too
    deep to be read, or more than `most_levels` deep, which None leaves out."""
    try:
        value = decoder.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if most_levels is None:
        return value
    level, depth = [value], 0
    while level := [part for whole in level if isinstance(whole, (dict, list)) for part in _parts(whole)]:
        depth += 1
        if depth > most_levels:
            raise ValueError("nested too deeply")
    return value


def _parts(whole: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return whole.values() if isinstance(whole, dict) else whole


def why_not_json(error: ValueError) -> str:
    """In words, what decoding bytes as UTF-8 or `parse_json` has raised."""
    if isinstance(error, UnicodeDecodeError):
        return f"not a text file in UTF-8: {error.reason} at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    return f"not JSON that can be read: {error}"


def read_json_object(path: Path, advice: str, decoder: json.JSONDecoder = _DECODER) -> dict[str, Any]:
    """The JSON object in the file at `path`. Raises UserError with the file, the reason and `advice`, what to do."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"), decoder)
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
    except ValueError as error:
        why = why_not_json(error)
    else:
        if isinstance(value, dict):
            return value
        why = f"holds a JSON {type(value).__name__}, expected an object, {{...}}"
    raise UserError(f"{path}: {why}; {advice}")
