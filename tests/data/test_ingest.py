"""Reading documents: every kind of file gives the same texts in order, and damaged input is never half read."""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path

import pytest
import zstandard

from dqt_dist.data.ingest import TEXT_DOCUMENT_CHARACTERS, HubDataset, Source, local_source, read_documents
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
    assert "".join(pieces) == text  # nothing lost, nothing changed
    assert all(len(piece) >= TEXT_DOCUMENT_CHARACTERS for piece in pieces[:-1])
    assert read(tmp_path / "a.txt.zst") == pieces
    (tmp_path / "short.txt").write_text("one\n\ntwo\n")
    assert read(tmp_path / "short.txt") == ["one\n\ntwo\n"]


def test_text_file_keeps_empty_lines_and_line_ends_and_loses_only_its_byte_order_mark(tmp_path: Path):
    text = "\n\n  indented\r\n\n\n\nline separator \u2028 and \x0c stay\n \t\nend without newline"
    for content in (text, text * 1000, "no empty line at all\n" * 200_000):
        (tmp_path / "a.txt").write_bytes(content.encode())
        assert "".join(read(tmp_path / "a.txt")) == content
        assert max(map(len, read(tmp_path / "a.txt"))) < 2**20 + 100
    for suffix, pack in (("", bytes), (".gz", gzip.compress), (".zst", zstd)):
        (tmp_path / f"mark.txt{suffix}").write_bytes(pack("\ufeffone \ufeff two".encode()))
        assert read(tmp_path / f"mark.txt{suffix}") == ["one \ufeff two"]
        (tmp_path / f"mark.jsonl{suffix}").write_bytes(pack("\ufeff".encode() + jsonl(["a", "b"])))
        assert read(tmp_path / f"mark.jsonl{suffix}") == ["a", "b"]


def test_only_the_wanted_field_of_json_lines_is_looked_at(tmp_path: Path):
    """Types that change from line to line, dates, numbers beyond 64 bits, keys that come and go, repeated later."""
    others: list[object] = [None, 1, "a", 2.5, {"a": 1}, {"b": [1, "x"]}, [], 10**6000, True]
    sys.set_int_max_str_digits(0)
    try:
        rows = [{"text": f"2020-01-{i + 10}", "url": other, f"key{i}": i} for i, other in enumerate(others)]
        lines = "".join(json.dumps(row) + "\r\n\n" for row in rows)
    finally:
        sys.set_int_max_str_digits(4300)
    for name in ("a.jsonl", "a.json", "a::b.jsonl"):
        (tmp_path / name).write_text(lines)
        assert read(tmp_path / name) == [row["text"] for row in rows]


def test_text_key_with_a_dot_reads_inside_of_objects(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"meta": {"text": "one", "n": 1}}, {"meta": None}, {"meta": {"text": None}}, {"meta": {"text": "two"}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "flat.jsonl").write_text('{"meta.text": "one", "meta": 3}\n{"meta": {"text": "two"}}\n')
    parquet.write_table(pyarrow.table({"meta.text": ["one", "two"], "meta": [3, 4]}), tmp_path / "flat.parquet")
    for path in tmp_path.iterdir():
        assert read(path, text_key="meta.text") == ["one", "two"], path.name


def test_empty_files_and_every_type_of_text_column_are_read(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    empty = tmp_path / "empty"
    empty.mkdir()
    for name, content in (("a.txt", b""), ("a.jsonl", b"\n"), ("a.jsonl.gz", b""), ("b.jsonl.gz", gzip.compress(b""))):
        (empty / name).write_bytes(content)
    (empty / "a.jsonl.zst").write_bytes(zstd(b""))
    for name, kind in (("strings", pyarrow.string()), ("nulls", pyarrow.null())):
        parquet.write_table(pyarrow.table({"text": pyarrow.array([], kind)}), empty / f"{name}.parquet")
    assert read(empty / "*") == []
    texts = ["caf\u00e9", None, "2020-01-01"]
    strings = pyarrow.array(texts)
    columns = [
        strings,
        strings.cast(pyarrow.large_string()),
        strings.cast(pyarrow.binary()),
        strings.dictionary_encode(),
    ]
    for column in columns:
        parquet.write_table(pyarrow.table({"text": column, "n": [1, 2, 3]}), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == ["caf\u00e9", "2020-01-01"], column.type
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert read(tmp_path / "a.parquet.gz") == ["caf\u00e9", "2020-01-01"]


BAD_LINES = [
    (b'{"text": "x\\ud83d"}', "'text' holds \\ud83d, half a surrogate pair, at character 2"),
    (b'{"text": "caf\xe9"}', "is not UTF-8: byte 0xe9 at position 14"),
    (b'{"text": "cut', "is not one JSON object: Unterminated string starting at (column 10)"),
    (b'{"text": "x"} {"text": "y"}', "is not one JSON object: Extra data (column 15)"),
    (b'{"body": "x", "title": 2}', "has no key 'text'; it has 'body', 'title'. Set --text-key"),
    (b'{"text": 3}', "'text' is a number, expected a string"),
    (b'{"text": ["x"]}', "'text' is an array, expected a string"),
    (b'["text"]', "is an array, expected an object with the key 'text'"),
    (b"[" * 100_000, "is nested too deeply"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_lines_are_named_and_can_be_left_out(tmp_path: Path, line: bytes, message: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["good"] * 30_000) + line + b"\n" + jsonl(["after"]))
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"--input {path}, line 30001: {message}")
    left_out: list[str] = []
    assert list(read_documents(local_source([str(path)]), left_out.append))[-2:] == ["good", "after"]
    assert left_out == [str(caught.value)]


def test_bad_rows_of_parquet_and_text_are_named(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [b"good", b"caf\xe9"], "number": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: is not UTF-8: byte 0xe9 at position 4"):
        read(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: column 'number' is int64, expected strings"):
        read(tmp_path / "a.parquet", text_key="number")
    with pytest.raises(UserError, match=r"a\.parquet: has no column 'body'; it has 'text', 'number'"):
        read(tmp_path / "a.parquet", text_key="body")
    (tmp_path / "a.txt").write_bytes(b"one\ntw\xff\n")
    with pytest.raises(UserError, match=r"a\.txt, line 2: is not UTF-8: byte 0xff at position 3"):
        read(tmp_path / "a.txt")


def test_dataset_rows_are_read_and_named_in_the_same_way(tmp_path: Path):
    """A folder is a dataset to `datasets`, as a name on the hub is."""
    (tmp_path / "train.jsonl").write_text('{"meta": {"text": "one"}, "n": 1}\n{"meta": {"text": "two"}, "n": 2}\n')
    hub = HubDataset(str(tmp_path))
    assert list(read_documents(Source(hub=hub, text_key="meta.text"))) == ["one", "two"]
    with pytest.raises(UserError, match=r"row 1: 'n' is int, expected a string"):
        list(read_documents(Source(hub=hub, text_key="n")))


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
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(jsonl([str(i) for i in range(9999)]))[:-100], "cannot be read"),
        ("a.jsonl.zst", b"not zstd at all", "not a zstd file"),
        ("a.parquet", b"hello", "cannot be read"),
        ("a.csv", b"a,b\n", "unknown kind of file; known are .txt, .jsonl, .json, .parquet"),
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
