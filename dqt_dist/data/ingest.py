"""Where documents come from: local files, the Python documentation, or a Hugging Face dataset.

Hugging Face `datasets` reads and decompresses everything, in streaming mode: nothing is copied to its cache, memory
stays bounded, and documents come in the order of the files and of the lines in them. What a document is:

    .jsonl    one JSON object per line; the document is its `text_key` field
    .parquet  one row; the document is its `text_key` column
    .txt      the file is cut at empty lines into documents of at least TEXT_DOCUMENT_CHARACTERS. A short file is one
              document; a book becomes several, so that shuffling and a validation split have something to work on,
              and each is still far longer than a paragraph
    each of them also compressed as .gz or .zst (windows up to 128 MiB, zstd's own default limit)

Documents without any text (empty or white space) are dropped here.
"""

from __future__ import annotations

import contextlib
import glob
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqt_dist.errors import UserError

PYTHON_DOCS = "python-docs"
TEXT_DOCUMENT_CHARACTERS = 8192  # about 2,000 tokens, as long as the contexts that are trained on here

_FORMATS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
_COMPRESSIONS = (".gz", ".zst")


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


def read_documents(source: Source) -> Iterator[str]:
    """Yield the documents of a source that hold any text, in order. Raises UserError naming the file for unreadable
    input."""
    if source.python_docs:
        texts: Iterator[str] = _python_docs()
    elif source.hub is not None:
        texts = _read_hub(source.hub, source.text_key)
    else:
        texts = (text for path in source.files for text in _read_file(path, source.text_key))
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
    """The `datasets` builder for a file name: text, json or parquet."""
    suffixes = path.suffixes[-2:]
    kind = suffixes[0] if len(suffixes) == 2 and suffixes[1] in _COMPRESSIONS else path.suffix
    if kind not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise UserError(
            f"--input {path}: unknown kind of file; known are {known}, each also with {' or '.join(_COMPRESSIONS)}"
        )
    return _FORMATS[kind]


def _datasets() -> Any:
    """The `datasets` module, imported late (it takes seconds), without its log lines: its errors reach the user once,
    as ours."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _read_file(path: Path, text_key: str) -> Iterator[str]:
    datasets = _datasets()
    kind = _format_of(path)
    if path.stat().st_size == 0:
        raise UserError(f"--input {path}: the file is empty")
    if path.suffix == ".zst":
        _require_complete_zstd(path)
    with _errors_name(f"--input {path}"):
        # Escaped, because data_files takes patterns and the name of a file may look like one.
        arguments = {"data_files": glob.escape(str(path.resolve())), "split": "train", "streaming": True}
        if kind == "text":
            yield from _joined_paragraphs(
                r["text"] for r in datasets.load_dataset("text", sample_by="paragraph", **arguments)
            )
        else:
            yield from _texts_of(datasets.load_dataset(kind, **arguments), text_key, f"--input {path}")


def _read_hub(hub: HubDataset, text_key: str) -> Iterator[str]:
    datasets = _datasets()
    where = f"--hf-dataset {hub.name}"
    with _errors_name(where):
        rows = datasets.load_dataset(hub.name, hub.config, split=hub.split, streaming=True)
        yield from _texts_of(rows, text_key, where)


def _texts_of(rows: Any, text_key: str, where: str) -> Iterator[str]:
    """The text field of each row of an IterableDataset."""
    for number, row in enumerate(rows, start=1):
        text = row.get(text_key)
        if isinstance(text, str):
            yield text
        elif text_key not in row:
            raise UserError(
                f"{where}: row {number} has no key {text_key!r}; it has {', '.join(map(repr, row))}. Set --text-key"
            )
        elif text is not None:  # null is a document without text
            raise UserError(
                f"{where}: row {number}: {text_key!r} is {type(text).__name__}, expected a string. Set --text-key"
            )


def _joined_paragraphs(paragraphs: Iterator[str]) -> Iterator[str]:
    """Join paragraphs by empty lines into documents of at least TEXT_DOCUMENT_CHARACTERS; the last may be shorter."""
    document: list[str] = []
    characters = 0
    for paragraph in paragraphs:
        document.append(paragraph.strip("\n"))
        characters += len(paragraph)
        if characters >= TEXT_DOCUMENT_CHARACTERS:
            yield "\n\n".join(document)
            document, characters = [], 0
    if document:
        yield "\n\n".join(document)


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
