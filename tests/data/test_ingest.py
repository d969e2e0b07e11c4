"""Reading documents: every kind of file gives the same texts in order, and damaged input is never half read."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import zstandard

from dqt_dist.data.ingest import TEXT_DOCUMENT_CHARACTERS, local_source, read_documents
from dqt_dist.data.python_docs import read_python_docs
from dqt_dist.errors import UserError

LONG_WINDOW = zstandard.ZstdCompressionParameters(window_log=26, enable_ldm=True)  # 64 MiB


def read(*inputs: object, text_key: str = "text") -> list[str]:
    return list(read_documents(local_source([str(i) for i in inputs], text_key)))


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(compression_params=LONG_WINDOW).compress(data)


def test_every_kind_of_file_gives_the_same_documents(documents, tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    data = jsonl(documents)
    half = data.index(b"\n", len(data) // 2) + 1
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(data))
    (tmp_path / "frames.jsonl.zst").write_bytes(zstd(data[:half]) + zstd(data[half:]))
    parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        assert read(path) == documents, path.name


def test_pattern_is_sorted_and_other_inputs_keep_their_order(tmp_path: Path):
    for name in ("b", "a", "c[1]"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([name]))
    assert read(tmp_path / "?.jsonl") == ["a", "b"]
    assert read(tmp_path / "b.jsonl", tmp_path / "a.jsonl") == ["b", "a"]
    assert read(tmp_path / "c[1].jsonl") == ["c[1]"]  # a file name that looks like a pattern


def test_empty_documents_are_dropped_and_text_key_is_used(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(
        '{"body": "one"}\n{"body": ""}\n{"body": null}\n{"body": " \\n"}\n{"body": "two"}\n'
    )
    assert read(tmp_path / "a.jsonl", text_key="body") == ["one", "two"]


def test_text_file_is_cut_at_empty_lines_into_long_documents(documents, tmp_path: Path):
    text = "\n\n".join(documents)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.zst").write_bytes(zstd(text.encode()))
    pieces = read(tmp_path / "a.txt")
    assert len(pieces) > 5
    assert "\n\n".join(pieces) == text  # nothing lost, nothing changed
    assert all(len(piece) >= TEXT_DOCUMENT_CHARACTERS for piece in pieces[:-1])
    assert read(tmp_path / "a.txt.zst") == pieces
    (tmp_path / "short.txt").write_text("one\n\ntwo\n")
    assert read(tmp_path / "short.txt") == ["one\n\ntwo"]


def test_truncated_zst_is_refused_wherever_it_is_cut(documents, tmp_path: Path):
    """Streaming decompression alone takes a cut .zst for the end of the text, which would shorten a corpus."""
    whole = zstd(jsonl(documents)) + zstd("\n\n".join(documents).encode())
    (tmp_path / "whole.txt.zst").write_bytes(whole)
    assert read(tmp_path / "whole.txt.zst")  # negative control: the uncut file is read
    for cut in (3, 12, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "cut.txt.zst"
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=re.escape(str(path))):
            read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": 1, "title": 2}\n', "has no key 'text'; it has 'body', 'title'. Set --text-key"),
        ("a.jsonl", b'{"text": 3}\n', "'text' is int, expected a string"),
        ("a.jsonl", b'{"text": "x"}\n{"text": oops\n', "cannot be read"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(jsonl([str(i) for i in range(9999)]))[:-100], "cannot be read"),
        ("a.jsonl.zst", b"not zstd at all", "not a zstd file"),
        ("a.parquet", b"hello", "cannot be read"),
        ("a.txt", "caf\u00e9".encode("latin-1"), "cannot be read"),
        ("a.txt", b"", "the file is empty"),
        ("a.csv", b"a,b\n", "unknown kind of file; known are .txt, .jsonl, .parquet"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_bad_words_are_named(tmp_path: Path):
    for word, message in (("none.txt", "no such file"), ("*.txt", "matches no file"), (".", "is a folder")):
        with pytest.raises(UserError, match=message):
            local_source([str(tmp_path / word)])
    with pytest.raises(UserError, match="stands alone"):
        local_source(["python-docs", "a.txt"])


MODULE = '''"""This module shows which of its words are prose, and which are not."""
# A comment that goes on over two lines is one paragraph
# of its own when it ends like a sentence.
x = 1  # short
def f(a, b):
    """Return the sum of both of the numbers that are given here.

    >>> f(1, 2) is not prose because it is a session of the interpreter.

        a_table = [1, 2, 3]; b_table = {4: 5}; c_table = (6,); d = 0; e = 9.
    """
'''


def test_python_docs_keep_prose_and_drop_code(tmp_path: Path):
    (tmp_path / "a.py").write_text(MODULE)
    (tmp_path / "b.py").write_text(MODULE)  # nothing new: no document
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text('"""A test folder is not read, however well it may be written."""')
    assert list(read_python_docs(tmp_path)) == [
        "This module shows which of its words are prose, and which are not.\n\n"
        "A comment that goes on over two lines is one paragraph of its own when it ends like a sentence.\n\n"
        "Return the sum of both of the numbers that are given here."
    ]
