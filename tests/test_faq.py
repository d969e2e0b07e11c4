"""Each message that docs/faq.md quotes is still one of the program, with any values in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/faq.md").read_text(encoding="utf-8")
FEWEST_LETTERS = 10
"""Letters of its own that a message must have, so that none is a pattern for anything."""


def quoted(page: str) -> list[str]:
    """The indented paragraphs of the page, each as one line."""
    paragraphs = re.findall(r"(?:^ {4}\S.*\n)+", page, re.MULTILINE)
    return [" ".join(paragraph.split()) for paragraph in paragraphs]


def patterns(source: str) -> list[re.Pattern[str]]:
    """A pattern per text of a module: its words, with anything in place of its values."""
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = node.values
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = [node]
        else:
            continue
        words = ["".join(part.value.split("\n")) if isinstance(part, ast.Constant) else None for part in parts]
        if sum(len(re.sub(r"\W", "", word)) for word in words if word) >= FEWEST_LETTERS:
            found.append(re.compile("".join(".*" if word is None else re.escape(word) for word in words)))
    return found


MESSAGES = [
    pattern for path in sorted((ROOT / "dqt_dist").rglob("*.py")) for pattern in patterns(path.read_text("utf-8"))
]


def is_said(message: str) -> bool:
    return any(pattern.fullmatch(message) for pattern in MESSAGES)


@pytest.mark.parametrize("message", quoted(PAGE), ids=lambda message: message[:40])
def test_the_program_says_what_is_quoted(message: str) -> None:
    assert is_said(message)


def test_what_the_program_does_not_say_is_found() -> None:
    """Negative control: another word in a message, and a message that is cut off."""
    message = "model.num_layers: 24 is not divisible by parallel.pipeline = 5; nearest: 20 or 25"
    assert is_said(message) and len(quoted(PAGE)) > 25
    assert not is_said(message.replace("divisible", "dividable")) and not is_said(message.split(";")[0])
