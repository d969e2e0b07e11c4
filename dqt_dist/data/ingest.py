"""Where documents come from: local files, the Python documentation, or a Hugging Face dataset.

Files are read as streams: memory stays bounded, and documents come in the order of the files and of the lines in them.
Only the wanted field is looked at, so what else a row holds, and of which type, does not matter. What a document is:

    .jsonl    one JSON object per line (also named .json); the document is its `text_key` field
    .parquet  one row; the document is its `text_key` column, of strings or of UTF-8 bytes
    .txt      the file is cut after empty lines into documents of at least TEXT_DOCUMENT_CHARACTERS, so that shuffling
              and a validation split have something to work on. A short file is one document. Documents one after
              another are the file, every empty line included
    each of them also compressed as .gz or .zst (windows up to 128 MiB, zstd's own default limit)

The key `meta.text` is the field `text` of the object `meta`. A byte-order mark that begins a file is not text.
Documents without any text (null, empty or white space) are dropped here, and a file may hold none.

A bad row has no such field, or a value that is no text: broken JSON, another type, bytes that are not UTF-8, half a
surrogate pair. The caller says what happens with it; by default it ends the reading with its file and line.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from dqt_dist.errors import UserError
from dqt_dist.json_files import parse_json

T = TypeVar("T")

PYTHON_DOCS = "python-docs"
TEXT_DOCUMENT_CHARACTERS = 8192  # about 2,000 tokens, as long as the contexts that are trained on here
# Where a .txt file has no empty line for so long, it is cut at the end of a line: a document is held in memory.
_LONGEST_TEXT_DOCUMENT = 2**20

_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_COMPRESSIONS = (".gz", ".zst")
_PARQUET_ROWS = 1024  # read at a time
# JSON's words for what Python's types are called here; every number is read as a float, however long it is.
_JSON_KINDS = {float: "a number", bool: "true or false", list: "an array", dict: "an object", str: "a string"}
_json = json.JSONDecoder(parse_int=float)

OnBadRow = Callable[[str], None]
"""Gets the message that names a bad row and says what is wrong with it; the row is left out when it returns."""


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face hub: load_dataset(name, config, split=split)."""

    name: str
    config: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class Source:
    """What to read: files (in this order), or the Python documentation, or a hub dataset; exactly one of the three is
    set."""

    files: tuple[Path, ...] = ()
    python_docs: bool = False
    hub: HubDataset | None = None
    text_key: str = "text"

    def identity(self) -> list[Any]:
        """Plain data that changes when the documents may have changed: path, size and time of each file; the
        interpreter's version; the dataset's name (a hub dataset is taken to stay as it is)."""
        if self.python_docs:
            return [PYTHON_DOCS, sys.version]
        if self.hub is not None:
            return ["hub", self.hub.name, self.hub.config, self.hub.split, self.text_key]
        stats = [(path, path.stat()) for path in self.files]
        return [self.text_key, *([str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats)]


def local_source(inputs: list[str], text_key: str = "text") -> Source:
    """A source from command-line words: paths, quoted patterns (expanded in sorted order), or the one word
    `python-docs`.

    Raises UserError for a pattern without match, a missing file, a folder, or a file name of no known kind.
    """
    if PYTHON_DOCS in inputs:
        if len(inputs) > 1:
            raise UserError(f"--input {PYTHON_DOCS} stands alone; it was given with {len(inputs) - 1} other input(s)")
        return Source(python_docs=True)
    files: list[Path] = []
    for word in inputs:
        matches = (
            sorted(glob.glob(word, recursive=True)) if glob.has_magic(word) and not Path(word).exists() else [word]
        )
        if not matches:
            raise UserError(f"--input {word}: the pattern matches no file")
        files += map(Path, matches)
    for path in files:
        if path.is_dir():
            raise UserError(f"--input {path}: is a folder; name its files, for example '{path}/*.jsonl.zst'")
        if not path.is_file():
            raise UserError(f"--input {path}: no such file")
        _format_of(path)
    return Source(files=tuple(files), text_key=text_key)


def refuse_row(message: str) -> None:
    """Raises the UserError for a bad row."""
    raise UserError(message)


def read_documents(source: Source, on_bad_row: OnBadRow = refuse_row) -> Iterator[str]:
    """Yield the documents of a source that hold any text, in order. Raises UserError naming the file for unreadable
    input."""
    if source.python_docs:
        texts: Iterator[str] = _python_docs()
    elif source.hub is not None:
        texts = _read_hub(source.hub, source.text_key, on_bad_row)
    else:
        texts = (text for path in source.files for text in _read_file(path, source.text_key, on_bad_row))
    return (text for text in texts if text.strip())


_python_docs_read: list[str] = []


def _python_docs() -> Iterator[str]:
    """Two megabytes that take some ten seconds to extract and are wanted twice (tokenizer, then tokens): kept once
    read."""
    if not _python_docs_read:
        from dqt_dist.data.python_docs import read_python_docs

        texts = []
        for text in read_python_docs():
            texts.append(text)
            yield text
        _python_docs_read.extend(texts)
    else:
        yield from _python_docs_read


def _format_of(path: Path) -> str:
    """How a file of this name is read: as text, json or parquet."""
    suffixes = path.suffixes[-2:]
    kind = suffixes[0] if len(suffixes) == 2 and suffixes[1] in _COMPRESSIONS else path.suffix
    if kind not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise UserError(
            f"--input {path}: unknown kind of file; known are {known}, each also with {' or '.join(_COMPRESSIONS)}"
        )
    return _FORMATS[kind]


def _read_file(path: Path, text_key: str, on_bad_row: OnBadRow) -> Iterator[str]:
    where = f"--input {path}"
    if path.suffix == ".zst":
        _require_complete_zstd(path)
    with _errors_name(where), _decompressed(path) as file:
        match _format_of(path):
            case "parquet":
                yield from _parquet_texts(file, text_key, where, on_bad_row)
            case "json":
                yield from _texts(_lines(file), lambda line: _json_text(line, text_key), f"{where}, line", on_bad_row)
            case _:
                yield from _text_documents(_texts(_lines(file), _utf8, f"{where}, line", on_bad_row))


@contextlib.contextmanager
def _decompressed(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, without its compression. Those of .parquet.gz are put into a temporary file: parquet is read
    from its end."""
    with contextlib.ExitStack() as opened:
        file: Any = opened.enter_context(open(path, "rb"))
        if path.suffix == ".gz":
            file = opened.enter_context(gzip.GzipFile(fileobj=file))
        elif path.suffix == ".zst":
            import zstandard

            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            file = opened.enter_context(io.BufferedReader(reader, 2**17))  # which has lines
        if path.suffix in _COMPRESSIONS and _format_of(path) == "parquet":
            whole = opened.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, whole)
            file = whole
        yield file


# ---- rows ----


class _BadRow(Exception):
    """What is wrong with one row."""


def _texts(rows: Iterable[T], text_of: Callable[[T], str | None], where: str, on_bad_row: OnBadRow) -> Iterator[str]:
    """The text of each row that has one. `where` and the number of a bad row, counted from 1, name it."""
    for number, row in enumerate(rows, start=1):
        try:
            text = text_of(row)
        except _BadRow as error:
            on_bad_row(f"{where} {number}: {error}")
            continue
        if text is not None:
            yield text


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines with their ends, which are newlines alone (str.splitlines knows ten more), without a first mark."""
    for number, line in enumerate(file):
        yield line if number else line.removeprefix(codecs.BOM_UTF8)


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _BadRow(f"is not UTF-8: byte {data[error.start]:#04x} at position {error.start + 1}") from error


def _json_text(line: bytes, text_key: str) -> str | None:
    """The text field of a line; None for an empty line."""
    # The mark begins a line where files with marks were put together.
    text = _utf8(line).strip().removeprefix("\ufeff")
    if not text:
        return None
    try:
        row = parse_json(text, _json, most_levels=None)
    except json.JSONDecodeError as error:
        raise _BadRow(f"is not one JSON object: {error.msg} (column {error.colno})") from error
    except ValueError as error:
        raise _BadRow(f"is {error}") from error
    return _text_of(row, text_key)


def _text_of(row: object, text_key: str) -> str | None:
    """The field `text_key` of a row; None where it is null, or the object that has it."""
    value = row
    for key in _path(row, text_key):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise _BadRow(f"is {_kind(value)}, expected an object with the key {text_key!r}")
        if key not in value:
            raise _BadRow(f"has no key {text_key!r}; it has {_listed(value)}. Set --text-key")
        value = value[key]
    if isinstance(value, bytes):
        value = _utf8(value)
    if value is not None and not isinstance(value, str):
        raise _BadRow(f"{text_key!r} is {_kind(value)}, expected a string. Set --text-key")
    if value is not None and not value.isascii():
        _require_whole_characters(value, text_key)
    return value


def _path(fields: object, text_key: str) -> list[str]:
    """The keys from the row to the text: a field of the whole name comes before one inside an object."""
    return [text_key] if isinstance(fields, dict | list) and text_key in fields else text_key.split(".")


def _kind(value: object) -> str:
    return _JSON_KINDS.get(type(value), type(value).__name__)


def _listed(names: Iterable[str]) -> str:
    shown = list(map(repr, names))
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "") if shown else "none"


def _require_whole_characters(text: str, text_key: str) -> None:
    """JSON may hold half a surrogate pair (a text that was cut inside of an emoji), which has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise _BadRow(f"{text_key!r} holds {half}, half a surrogate pair, at character {error.start + 1}") from error


def _text_documents(lines: Iterable[str]) -> Iterator[str]:
    """Cut after empty lines into documents of at least TEXT_DOCUMENT_CHARACTERS; the last may be shorter."""
    document: list[str] = []
    characters, after_empty = 0, False
    for line in lines:
        empty = not line.strip()
        at_cut = after_empty and not empty and characters >= TEXT_DOCUMENT_CHARACTERS
        if at_cut or characters >= _LONGEST_TEXT_DOCUMENT:
            yield "".join(document)
            document, characters = [], 0
        document.append(line)
        characters += len(line)
        after_empty = empty
    yield "".join(document)


# ---- parquet ----


def _parquet_texts(file: IO[bytes], text_key: str, where: str, on_bad_row: OnBadRow) -> Iterator[str]:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file)
    path = _path(table.schema_arrow.names, text_key)
    if not _require_text_column(table.schema_arrow, path, text_key, where):
        return
    values = (
        value
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_key])
        for value in _column_bytes(batch, path)
    )
    yield from _texts(values, lambda value: None if value is None else _utf8(value), f"{where}, row", on_bad_row)


def _require_text_column(schema: Any, path: list[str], text_key: str, where: str) -> bool:
    """Whether the column can hold text; one of nulls, as a table without rows may have, cannot. Raises UserError for a
    missing column and one of another type."""
    import pyarrow
    from pyarrow import types

    kind = pyarrow.struct(list(schema))
    for key in path:
        if not types.is_struct(kind) or kind.get_field_index(key) < 0:
            raise UserError(f"{where}: has no column {text_key!r}; it has {_listed(schema.names)}. Set --text-key")
        kind = kind.field(key).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(is_one(kind) for is_one in (*texts, types.is_binary_view, types.is_null)):
        raise UserError(f"{where}: column {text_key!r} is {kind}, expected strings. Set --text-key")
    return not types.is_null(kind)


def _column_bytes(batch: Any, path: list[str]) -> list[bytes | None]:
    """The values of a column of text as bytes, which pyarrow does not decode: one bad value would fail all."""
    import pyarrow
    from pyarrow import compute

    column = batch.column(path[0])
    if len(path) > 1:
        column = compute.struct_field(column, path[1:])  # pyright: ignore[reportAttributeAccessIssue]
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary()).to_pylist()


# ---- the hub ----


def _read_hub(hub: HubDataset, text_key: str, on_bad_row: OnBadRow) -> Iterator[str]:
    import datasets  # takes seconds

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors reach the user once, as ours
    where = f"--hf-dataset {hub.name}"
    with _errors_name(where):
        rows = datasets.load_dataset(hub.name, hub.config, split=hub.split, streaming=True)
        column = _path(rows.column_names, text_key)[0]
        if column in (rows.column_names or ()):
            rows = rows.select_columns(column)  # the others may be images or sounds, which would be decoded
        yield from _texts(rows, lambda row: _text_of(row, text_key), f"{where}, row", on_bad_row)


def _require_complete_zstd(path: Path) -> None:
    """Raise UserError when a .zst file stops before the end of its last frame.

    A streaming decompressor cannot tell that from the end of the text, so half a corpus would be read in silence. This
    walks over the block headers (RFC 8878, section 3.1) without decompressing anything: 3 bytes in each 128 KiB of
    text.
    """
    import zstandard

    size = path.stat().st_size
    with open(path, "rb") as file:
        position = 0
        while position < size:
            file.seek(position)
            head = file.read(18)  # the longest frame header
            if head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:  # a skippable frame: magic, length, anything
                position += 8 + int.from_bytes(head[4:8], "little")
                continue
            try:
                checksum_bytes = 4 if zstandard.get_frame_parameters(head).has_checksum else 0
                position += zstandard.frame_header_size(head)
            except zstandard.ZstdError as error:
                raise UserError(f"--input {path}: not a zstd file, or damaged at byte {position}: {error}") from error
            last = False
            while not last and position < size:
                file.seek(position)
                block = int.from_bytes(file.read(3), "little")  # bit 0: last block; bits 1-2: type; the rest: length
                last = bool(block & 1)
                position += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)  # type 1 repeats a single byte
            position += checksum_bytes
            if not last or position > size:
                raise UserError(
                    f"--input {path}: is cut short: it ends at byte {size} inside a zstd frame; copy it again"
                )


@contextlib.contextmanager
def _errors_name(where: str) -> Iterator[None]:
    """Turn what `datasets` and its readers raise on bad input into a UserError that names the input."""
    try:
        yield
    except UserError:
        raise
    except (GeneratorExit, KeyboardInterrupt, MemoryError):
        raise
    except (
        Exception
    ) as error:  # the readers raise their own kinds: pyarrow, json, zstandard, zlib, huggingface_hub, OSError
        cause = error.__cause__ or error
        raise UserError(f"{where}: cannot be read: {type(cause).__name__}: {cause}") from error
