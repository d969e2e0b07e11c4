"""English prose that every Python carries: the docstrings and comments of its own standard library.

The demo needs real text without a network. The library's modules explain themselves in a few megabytes of English,
written by many hands; `pydoc_data/topics.py` adds the language reference that `help()` shows. Code, tables, doctest
sessions and licence blocks repeated over modules are left out: a paragraph is kept when most of it is words, and only
once.

One document is one module (for `topics.py`: one help topic), paragraphs in the order of the source, separated by an
empty line. The result depends on the running interpreter's version alone.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

# Folders that are not the library's own prose: its tests, other people's packages, data tables.
_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "lib2to3", "_bundled",
    "turtledemo",
}  # fmt: skip
_MIN_WORDS = 8
_MIN_LETTER_SHARE = 0.85  # letters, spaces and ordinary punctuation of prose; code and tables fall below
_PROSE_CHARACTERS = re.compile(r"[A-Za-z ,.;:'\"()-]")
_WORD = re.compile(r"[A-Za-z][a-z'-]*[.,;:!?)]*")


def read_python_docs(folder: Path | None = None) -> Iterator[str]:
    """Yield one document a module of the standard library (or of `folder`), sorted by path. Paragraphs are unique over
    all."""
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1]):
            for blocks in _documents_of(path):
                paragraphs = [p for block in blocks for p in _prose_paragraphs(block) if not (p in seen or seen.add(p))]
                if paragraphs:
                    yield "\n\n".join(paragraphs)


def _documents_of(path: Path) -> list[list[str]]:
    """The text blocks of one module, as one document or, for the help topics, as one document a topic."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", (SyntaxWarning, DeprecationWarning)
            )  # about escapes in the library's strings
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return []  # templates and deliberately broken files
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        tables = (node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict))
        return [
            [v.value]
            for table in tables
            for v in table.values
            if isinstance(v, ast.Constant) and isinstance(v.value, str)
        ]
    return [[text for _, text in sorted([*_docstrings(tree), *_comments(source)])]]


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line number, text) of the docstrings of the module, its classes and functions."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if (text := ast.get_docstring(node, clean=True)) is not None:
            yield node.body[0].lineno, text


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of each run of comments that stand alone on consecutive lines, not behind code."""
    first, lines = 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            if token.start[0] != first + len(lines):
                if lines:
                    yield first, inspect.cleandoc("\n".join(lines))
                first, lines = token.start[0], []
            lines.append(token.string.lstrip("#"))
    if lines:
        yield first, inspect.cleandoc("\n".join(lines))


def _prose_paragraphs(block: str) -> Iterator[str]:
    """The paragraphs of a block that read as English, each on one line."""
    for paragraph in re.split(r"\n\s*\n", block):
        if ">>>" in paragraph:
            continue
        text = " ".join(paragraph.split())
        words = text.split()
        if len(words) < _MIN_WORDS or text[-1] not in ".:;!?)\"'":
            continue
        letters = len(_PROSE_CHARACTERS.findall(text)) / len(text)
        plain_words = sum(_WORD.fullmatch(word) is not None for word in words) / len(words)
        if letters >= _MIN_LETTER_SHARE and plain_words >= 0.7:
            yield text
