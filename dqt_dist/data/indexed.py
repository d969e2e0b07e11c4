"""Prepared data on disk: Megatron's indexed format and a manifest beside it.

    NAME.bin    the token ids of all documents, one after another: uint16 if the vocabulary is below 65,500, else int32
    NAME.idx    Megatron's index: length (int32) and byte offset (int64) of each sequence, sequence bounds of documents
    NAME.json   our manifest: counts, file sizes, the vocabulary and the tokenizer's sha256 (class Manifest)

Every document ends with the id `eod_id`. A prefix ("data/demo/train") names the three files. Writing is megatron.core's
IndexedDatasetBuilder; this module feeds it from parallel processes, in the order of the input whatever their number,
and checks the files before training, because Megatron maps them into memory unchecked: a truncated .bin or a damaged
.idx is an error in the middle of a run, and ids above the vocabulary are an out-of-range read in the embedding, or a
vector of zeros where the embedding is spread over tensor-parallel ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shlex
import signal
import struct
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dqt_dist import MEGATRON_NOTES
from dqt_dist.command_line import as_typed
from dqt_dist.config import DataConfig, shown
from dqt_dist.data.tokenizer import SentencePieceTokenizer, Tokenizer, document_hash, load_tokenizer
from dqt_dist.errors import RunError, UserError
from dqt_dist.json_files import parse_json, read_json_object
from dqt_dist.progress_line import ProgressLine

MANIFEST_FORMAT = 1
PREPARE_AGAIN = "prepare the data again with --force"
_IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document bounds (documents + 1)
_IDX_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}  # Megatron's codes of integer types
_INDEX_ENTRIES = 2**22  # looked at at a time
_SCANNED_TOKENS = 2**24  # looked at at a time
_BATCH_CHARACTERS = 2**20  # of text handed to a worker at a time: some 0.3 s of work


@contextlib.contextmanager
def quiet_megatron_import() -> Iterator[None]:
    """Silence what `import megatron.core` says, also where a caller has set other warning filters."""
    with warnings.catch_warnings():
        for message in MEGATRON_NOTES:
            warnings.filterwarnings("ignore", message=message)
        yield


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What NAME.json says about NAME.bin and NAME.idx. `text_bytes` (UTF-8) and `words` are those of the source text;
    `tokens` includes the end-of-document marks; `request` identifies inputs and options, so that a repeated preparation
    can see that there is nothing to do; `skipped_rows` counts the bad rows of those inputs that were left out."""

    documents: int
    tokens: int
    text_bytes: int
    words: int
    vocab_size: int
    eod_id: int
    dtype: str
    tokenizer_sha256: str
    bin_bytes: int
    idx_bytes: int
    request: str
    skipped_rows: int = 0
    format: int = MANIFEST_FORMAT

    def write(self, path: Path) -> None:
        """Write as JSON (not atomic: the caller renames)."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @staticmethod
    def read(path: Path) -> Manifest | None:
        """Read a manifest; None where there is no such file. Raises UserError for one that cannot be understood."""
        if not path.is_file():
            return None
        fields = read_json_object(path, PREPARE_AGAIN)
        try:
            if fields.get("format") != MANIFEST_FORMAT:
                raise ValueError(f"format is {shown(fields.get('format'))}, expected {MANIFEST_FORMAT}")
            return _of_its_types(Manifest(**fields))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not a manifest of prepared data ({error}); {PREPARE_AGAIN}") from error


Record = TypeVar("Record")


def _of_its_types(record: Record) -> Record:
    """`record`, a dataclass of numbers and texts that came from a file. Raises ValueError for a value of another type
    and for numbers beyond 64 bits."""
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if type(value).__name__ != field.type or (type(value) is int and not -(2**63) <= value < 2**63):
            raise ValueError(f"{field.name} is {shown(value)}, should be {field.type}")
    return record


# ---------------------------------------------------------------- writing


@dataclasses.dataclass(frozen=True)
class TextLoss:
    """What documents lose on their way through a tokenizer and back.

    A character counts as lost when the decoded text has fewer of its kind; `tokens` leaves out end-of-document marks.
    `example` shows where the first document that changed is another one.
    """

    documents: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    characters: int = 0
    lost_characters: int = 0
    newlines: int = 0
    lost_newlines: int = 0
    example: str = ""

    def __add__(self, other: TextLoss) -> TextLoss:
        sums = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in dataclasses.fields(self)
            if field.name != "example"
        }
        return TextLoss(**sums, example=self.example or other.example)

    @property
    def largest_share(self) -> float:
        """The largest share of lost tokens, characters and newlines, in [0, 1]. Newlines stand alone because a
        tokenizer that drops all of them loses few characters of most texts."""
        parts = (self.unknown_tokens, self.lost_characters, self.lost_newlines)
        return max(
            part / (of or 1) for part, of in zip(parts, (self.tokens, self.characters, self.newlines), strict=True)
        )

    def __str__(self) -> str:
        def share(part: int, of: int) -> str:
            return f"{part:,} of {of:,} ({100 * part / (of or 1):.3g} %)"

        return (
            f"{share(self.unknown_tokens, self.tokens)} tokens are unknown, and decoding misses"
            f" {share(self.lost_characters, self.characters)} characters and"
            f" {share(self.lost_newlines, self.newlines)} newlines"
            + (f"; for example {self.example}" if self.example else "")
        )


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """Some documents in input order, as token ids: document i is the next `lengths[i]` entries of `ids`, eod included.
    `is_valid[i]` is whether the document belongs to the validation split. `loss` is of all of them."""

    ids: np.ndarray
    lengths: list[int]
    text_bytes: list[int]
    words: list[int]
    is_valid: list[bool]
    loss: TextLoss = TextLoss()


def text_loss(tokenizer: Tokenizer, texts: list[str], ids: list[list[int]]) -> TextLoss:
    """What `texts` lose as `ids`, their tokens without marks. Decoding all takes a tenth of the time of encoding."""
    loss = TextLoss(
        documents=len(texts),
        tokens=sum(map(len, ids)),
        unknown_tokens=sum(document.count(tokenizer.unknown_id) for document in ids),
        characters=sum(map(len, texts)),
        newlines=sum(text.count("\n") for text in texts),
    )
    for text, decoded in zip(texts, tokenizer.decode_batch(ids), strict=True):
        if text != decoded:
            missing = Counter(text) - Counter(decoded)
            example = loss.example or _difference(text, decoded)
            loss += TextLoss(lost_characters=missing.total(), lost_newlines=missing["\n"], example=example)
    return loss


def _difference(text: str, decoded: str) -> str:
    """What stands around the first character that differs."""
    alike = next((i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b), len(decoded))
    shown = slice(max(0, alike - 20), alike + 20)
    return f"{text[shown]!r} comes back as {decoded[shown]!r}"


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The type of the ids in .bin: uint16 where Megatron takes it, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32  # the bound of Megatron's DType.optimal_dtype


def belongs_to_valid(text: str, valid_fraction: float) -> bool:
    """Whether a document is held out: a function of its text alone, so it stays when documents are added or reordered,
    and equal texts are never in both splits."""
    return document_hash(text)[0] < valid_fraction


def encode_documents(
    documents: Iterable[str],
    tokenizer_path: Path,
    *,
    workers: int,
    valid_fraction: float = 0.0,
    pool: Executor | None = None,
) -> Iterator[EncodedBatch]:
    """Tokenise documents in `workers` processes; batches come in input order. At most 4 batches a worker are in
    memory.

    pool: workers that are there already, such as ranks of MPI that see the file of the tokenizer; else processes of
    this machine are started.
    """
    try:
        with contextlib.nullcontext(pool) if pool else _processes(workers) as encoders:
            yield from _encode(encoders, documents, tokenizer_path, workers, valid_fraction)
    except BrokenProcessPool as error:
        raise RunError(
            "a tokenising process was killed, perhaps for want of memory; run it again with a smaller --workers"
        ) from error


def _processes(workers: int) -> ProcessPoolExecutor:
    # Reading text starts threads, which a fork would copy half-way.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)


def _encode(
    pool: Executor, documents: Iterable[str], tokenizer_path: Path, workers: int, valid_fraction: float
) -> Iterator[EncodedBatch]:
    encode = functools.partial(_encode_batch, str(tokenizer_path.absolute()), valid_fraction)
    batches = _batched_by_characters(documents)
    waiting: deque[Future[EncodedBatch]] = deque(pool.submit(encode, b) for b in islice(batches, 4 * workers))
    while waiting:
        done = waiting.popleft().result()
        waiting.extend(pool.submit(encode, b) for b in islice(batches, 1))
        yield done


def _batched_by_characters(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its workers, and they would wait for more text for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@functools.cache
def _tokenizer_of_worker(path: str) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallel ones
    return load_tokenizer(path)


def _encode_batch(tokenizer_path: str, valid_fraction: float, texts: list[str]) -> EncodedBatch:
    tokenizer = _tokenizer_of_worker(tokenizer_path)
    encoded = tokenizer.encode_batch(texts)
    documents = [[*ids, tokenizer.eod_id] for ids in encoded]
    return EncodedBatch(
        ids=np.fromiter(chain.from_iterable(documents), token_dtype(tokenizer.vocab_size)),
        lengths=[len(ids) for ids in documents],
        text_bytes=[len(text.encode()) for text in texts],
        words=[len(text.split()) for text in texts],
        is_valid=[belongs_to_valid(text, valid_fraction) for text in texts],
        loss=text_loss(tokenizer, texts, encoded),
    )


class IndexedWriter:
    """Writes one .bin/.idx pair with its manifest. Give it a prefix in a scratch folder and rename the files when all
    is done."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer, request: str) -> None:
        with quiet_megatron_import():
            from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
        self.prefix, self.tokenizer, self.request = prefix, tokenizer, request
        self.documents = self.tokens = self.text_bytes = self.words = self.skipped_rows = 0
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=self._dtype)

    def add_batch(self, batch: EncodedBatch, only_valid: bool | None = None) -> None:
        """Append the documents of a batch; with `only_valid`, those whose is_valid equals it."""
        end = 0
        for i, length in enumerate(batch.lengths):
            end += length
            if only_valid is None or batch.is_valid[i] == only_valid:
                self._add(batch.ids[end - length : end], batch.text_bytes[i], batch.words[i])

    def _add(self, ids: np.ndarray, text_bytes: int, words: int) -> None:
        self._builder.add_document(ids, [len(ids)])  # type: ignore[arg-type]  # an array or a tensor
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self.words += words

    def close(self) -> None:
        """Close the .bin file; what was written stays unfinished, unless `finish` was called."""
        self._builder.data_file.close()

    def finish(self) -> Manifest:
        """Write .idx and .json; returns the manifest."""
        self._builder.finalize(f"{self.prefix}.idx")
        manifest = Manifest(
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            words=self.words,
            vocab_size=self.tokenizer.vocab_size,
            eod_id=self.tokenizer.eod_id,
            dtype=np.dtype(self._dtype).name,
            tokenizer_sha256=self.tokenizer.sha256,
            bin_bytes=os.path.getsize(f"{self.prefix}.bin"),
            idx_bytes=os.path.getsize(f"{self.prefix}.idx"),
            request=self.request,
            skipped_rows=self.skipped_rows,
        )
        manifest.write(Path(f"{self.prefix}.json"))
        return manifest


# ---------------------------------------------------------------- checking


def check_files(data: DataConfig, vocab_size: int, cache_folder: Path) -> None:
    """Check the tokenizer and all data of a run, as far as can be done without torch; UserError as `check_indexed` and
    `check_ids`.

    That a source is large enough for one sample shows only when a run opens it.
    """
    tokenizer = check_tokenizer(data.tokenizer, vocab_size)
    for field, sources in data.blends.items():
        for index, source in enumerate(sources):
            where = f"{field}[{index}].path"
            check_indexed(source.path, where=where, vocab_size=vocab_size, tokenizer=tokenizer)
            check_ids(source.path, where=where, vocab_size=vocab_size, cache_folder=cache_folder)


def check_tokenizer(path: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a run. Raises UserError: no such file, or more pieces than the model's vocabulary."""
    path = Path(path)
    if path.name == SentencePieceTokenizer.file_name and not path.is_file():
        raise UserError(
            f"data.tokenizer: {path} does not exist; this command makes it, with data, from Python's documentation, or"
            f" from your files in place of python-docs: {as_typed('dqt-prepare-data')} --input python-docs"
            f" --vocab-size {vocab_size} --output {shlex.quote(str(path.parent))}"
        )
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer: {tokenizer.path} has {tokenizer.vocab_size} pieces, but"
            f" {_too_small(vocab_size, tokenizer.vocab_size)}"
        )
    return tokenizer


def check_indexed(
    prefix: str | Path, *, where: str, vocab_size: int, tokenizer: Tokenizer | None = None
) -> tuple[int, int]:
    """Check a .bin/.idx pair before training; returns (sequences, tokens).

    where: the config field that names it, for the messages. vocab_size: the model's. Every entry of the index is looked
    at, and no token: `check_ids` does that. Data without our manifest (made by Megatron's own tool) are accepted.
    Raises UserError: missing, truncated, damaged or foreign files, a vocabulary above the model's, another tokenizer
    than the given one.
    """
    prefix = str(prefix)
    _check_exists(prefix, where)
    header = _read_header(Path(f"{prefix}.idx"), where)
    tokens = _check_index(Path(f"{prefix}.idx"), header, where)
    manifest = Manifest.read(Path(f"{prefix}.json"))
    bin_bytes = os.path.getsize(f"{prefix}.bin")
    expected_bytes = tokens * header.dtype.itemsize
    if bin_bytes != expected_bytes:
        raise UserError(
            f"{where}: {prefix}.bin has {bin_bytes} bytes, but {prefix}.idx describes {tokens} tokens of"
            f" {header.dtype.itemsize} bytes, {expected_bytes} bytes: the file is"
            f" {'cut short' if bin_bytes < expected_bytes else 'another one'};"
            " copy or prepare it again"
        )
    if tokens == 0:
        raise UserError(f"{where}: {prefix}.bin holds no tokens")
    if manifest is not None:
        _check_manifest(manifest, prefix, where, tokens, vocab_size, tokenizer)
    return header.sequences, tokens


def check_ids(prefix: str | Path, *, where: str, vocab_size: int, cache_folder: Path) -> None:
    """Check that every id in a .bin file, which `check_indexed` accepted, is in [0, vocab_size); UserError otherwise.

    The file is read once, by whoever comes first. What was found is kept beside it in NAME.ids.json, or in
    `cache_folder` where nothing can be written beside it, and counts as long as size, time and inode of the .bin stay.
    """
    found = _ids_of(str(prefix), where, cache_folder)
    if found.smallest < 0:
        raise UserError(f"{where}: {prefix}.bin holds token id {found.smallest}; copy or prepare it again")
    if found.largest >= vocab_size:
        raise UserError(
            f"{where}: {prefix}.bin holds token id {found.largest}, but {_too_small(vocab_size, found.largest + 1)}, or"
            " copy the file again if its tokenizer has no such id"
        )


@dataclasses.dataclass(frozen=True)
class _Ids:
    """What NAME.ids.json says: of which file, and its smallest and largest id."""

    bin_bytes: int
    bin_mtime_ns: int
    bin_inode: int
    dtype: str
    smallest: int
    largest: int


def _ids_of(prefix: str, where: str, cache_folder: Path) -> _Ids:
    stat = os.stat(f"{prefix}.bin")
    dtype = _read_header(Path(f"{prefix}.idx"), where).dtype
    identity = (stat.st_size, stat.st_mtime_ns, stat.st_ino, dtype.name)
    named = hashlib.sha256(os.path.abspath(prefix).encode()).hexdigest()[:16]
    places = [Path(f"{prefix}.ids.json"), cache_folder / f"{named}.ids.json"]
    for place in places:
        with contextlib.suppress(OSError, ValueError, TypeError):  # missing, or not such a file: it is made anew
            known = _of_its_types(_Ids(**parse_json(place.read_text())))
            if dataclasses.astuple(known)[:4] == identity:
                return known
    tokens = np.memmap(f"{prefix}.bin", dtype, mode="r")
    parts = [slice(first, first + _SCANNED_TOKENS) for first in range(0, len(tokens), _SCANNED_TOKENS)]
    shown = ProgressLine(parts, f"ids of {prefix}.bin", unit=" parts", delay=5)
    ranges = [(int(tokens[part].min()), int(tokens[part].max())) for part in shown]
    found = _Ids(*identity, smallest=min(low for low, _ in ranges), largest=max(high for _, high in ranges))
    for place in places:
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = place.with_name(f".{place.name}.{os.getpid()}")
            partial.write_text(json.dumps(dataclasses.asdict(found)) + "\n")
            partial.rename(place)
            break
    return found


def _check_exists(prefix: str, where: str) -> None:
    missing = [suffix for suffix in (".bin", ".idx") if not os.path.isfile(prefix + suffix)]
    if not missing:
        return
    if len(missing) == 1:
        raise UserError(
            f"{where}: {prefix}{missing[0]} is missing (its partner is there); copy it or prepare the data again"
        )
    message = f"{where}: neither {prefix}.bin nor {prefix}.idx exists"
    folder = Path(prefix) if os.path.isdir(prefix) else Path(prefix).parent
    there = sorted(str(path.with_suffix("")) for path in folder.glob("*.idx")) if folder.is_dir() else []
    hint = (
        f"it is the path without suffix; {folder} holds {', '.join(there)}"
        if there
        else f"{as_typed('dqt-prepare-data')} makes them"
    )
    raise UserError(f"{message}; {hint}")


@dataclasses.dataclass(frozen=True)
class _Header:
    """What the head of an .idx file says."""

    dtype: np.dtype[Any]
    sequences: int
    bounds: int
    """Of documents: one more than there are."""

    def array(self, path: Path, dtype: type[np.integer], count: int, skipped_bytes: int) -> np.ndarray:
        """A part of the file behind its head, mapped."""
        return np.memmap(path, dtype, mode="r", offset=_IDX_HEADER.size + skipped_bytes, shape=count)


def _read_header(path: Path, where: str) -> _Header:
    """The head of a Megatron .idx file, after checking the size of the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(_IDX_HEADER.size)
    if len(head) < _IDX_HEADER.size or head[:9] != _IDX_MAGIC:
        raise UserError(f"{where}: {path} is not a Megatron index file ({size} bytes)")
    _, version, code, sequences, bounds = _IDX_HEADER.unpack(head)
    if version != 1 or code not in _DTYPES:
        raise UserError(
            f"{where}: {path} has index version {version} and dtype code {code}; known is version 1 of integers"
        )
    expected = _IDX_HEADER.size + sequences * (4 + 8) + bounds * 8
    if size != expected or bounds == 0:
        raise UserError(
            f"{where}: {path} has {size} bytes, but its header describes {sequences} sequences and {bounds} document"
            f" bounds, {expected} bytes; copy or prepare it again"
        )
    return _Header(np.dtype(_DTYPES[code]), sequences, bounds)


def _check_index(path: Path, header: _Header, where: str) -> int:
    """The tokens that an index describes, after a look at every entry: sequences lie one after another from byte 0 on,
    and the bounds of documents go from 0 to the number of sequences."""
    sequences, item_bytes = header.sequences, header.dtype.itemsize
    if not sequences:
        return 0
    lengths = header.array(path, np.int32, sequences, 0)
    offsets_bytes = header.array(path, np.int64, sequences, 4 * sequences)
    bounds = header.array(path, np.int64, header.bounds, 12 * sequences)
    end = 0
    for first in range(0, sequences, _INDEX_ENTRIES):
        part = slice(first, first + _INDEX_ENTRIES)
        ends = end + np.cumsum(lengths[part], dtype=np.int64)
        starts = ends - lengths[part]
        if (wrong := (lengths[part] < 0) | (offsets_bytes[part] != starts * item_bytes)).any():
            i = int(wrong.argmax())
            raise UserError(
                f"{where}: {path} is damaged: sequence {first + i} has {lengths[first + i]} tokens and begins at byte"
                f" {offsets_bytes[first + i]}, where those before it end at byte {starts[i] * item_bytes}; copy or"
                " prepare it again"
            )
        end = int(ends[-1])
    wrong = np.diff(bounds, prepend=0, append=sequences) < 0
    if bounds[0] != 0 or bounds[-1] != sequences or wrong.any():
        i = min(int(wrong.argmax()), header.bounds - 1) if wrong.any() else 0 if bounds[0] else header.bounds - 1
        raise UserError(
            f"{where}: {path} is damaged: document bound {i} is {bounds[i]}; bounds grow from 0 to {sequences}, the"
            " number of sequences; copy or prepare it again"
        )
    return end


def _check_manifest(
    manifest: Manifest, prefix: str, where: str, tokens: int, vocab_size: int, tokenizer: Tokenizer | None
) -> None:
    if manifest.tokens != tokens:
        raise UserError(
            f"{where}: {prefix}.json counts {manifest.tokens} tokens, but {prefix}.idx and .bin hold {tokens}: they"
            " are not of one preparation; copy all three or prepare the data again"
        )
    if manifest.vocab_size > vocab_size:
        raise UserError(
            f"{where}: {prefix} was prepared with {manifest.vocab_size} pieces, but"
            f" {_too_small(vocab_size, manifest.vocab_size)}"
        )
    if tokenizer is not None and manifest.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"{where}: {prefix} was prepared with the tokenizer of sha256 {manifest.tokenizer_sha256[:16]}..., but"
            f" data.tokenizer {tokenizer.path} is {tokenizer.sha256[:16]}...; set data.tokenizer to the one that was"
            " used (it lies beside the data) or prepare the data again with --tokenizer"
        )


def _too_small(vocab_size: int, needed: int) -> str:
    return f"model.vocab_size is {vocab_size}; set model.vocab_size to {needed} or more"
