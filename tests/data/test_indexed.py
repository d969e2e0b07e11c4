"""Prepared files: what is written reads back equal for any number of processes, and bad files are refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from dqt_dist.config import DataConfig, DataSource
from dqt_dist.data.indexed import (
    IndexedWriter,
    Manifest,
    belongs_to_valid,
    check_files,
    check_ids,
    check_indexed,
    encode_documents,
    quiet_megatron_import,
    token_dtype,
)
from dqt_dist.errors import UserError
from tests.data.conftest import VOCAB_SIZE

with quiet_megatron_import():
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder


def check(prefix, vocab_size: int = VOCAB_SIZE, tokenizer=None) -> tuple[int, int]:
    return check_indexed(prefix, where="data.train[0].path", vocab_size=vocab_size, tokenizer=tokenizer)


def rewrite(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_megatron_reads_back_every_document_with_its_end_mark(prepared):
    indexed = IndexedDataset(prepared.train)
    assert len(indexed) == len(prepared.documents)
    for ids, text in zip((indexed[i] for i in range(len(indexed))), prepared.documents, strict=True):
        assert ids.dtype == np.uint16
        assert ids[-1] == prepared.tokenizer.eod_id
        assert prepared.tokenizer.decode(ids[:-1]) == text


def test_manifest_counts_what_is_there(prepared):
    manifest = Manifest.read(Path(f"{prepared.train}.json"))
    assert manifest is not None
    assert manifest.documents == len(prepared.documents)
    assert manifest.text_bytes == sum(len(text.encode()) for text in prepared.documents)
    assert manifest.words == sum(len(text.split()) for text in prepared.documents)
    assert manifest.bin_bytes == os.path.getsize(f"{prepared.train}.bin") == 2 * manifest.tokens
    assert check(prepared.train, tokenizer=prepared.tokenizer) == (manifest.documents, manifest.tokens)


def test_order_of_documents_does_not_depend_on_the_number_of_processes(prepared, monkeypatch):
    monkeypatch.setattr("dqt_dist.data.indexed._BATCH_CHARACTERS", 1)  # a document each, so that processes overtake
    results = []
    for workers in (1, 4):
        batches = list(
            encode_documents(prepared.documents, prepared.tokenizer.path, workers=workers, valid_fraction=0.3)
        )
        assert len(batches) > 20
        results.append((np.concatenate([b.ids for b in batches]), [v for b in batches for v in b.is_valid]))
    assert np.array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == [belongs_to_valid(text, 0.3) for text in prepared.documents]
    assert 0 < sum(results[0][1]) < len(prepared.documents)


@pytest.mark.parametrize("vocab_size", [100, 65499, 65500, 128256])
def test_token_type_is_the_one_megatron_takes(vocab_size):
    assert token_dtype(vocab_size) is DType.optimal_dtype(vocab_size)


def test_data_of_megatrons_own_tool_are_accepted(tmp_path: Path):
    builder = IndexedDatasetBuilder(str(tmp_path / "plain.bin"), dtype=np.int32)
    builder.add_document(np.arange(50), [20, 30])  # a document of two sequences, as its sentence splitting writes
    builder.finalize(str(tmp_path / "plain.idx"))
    assert check(tmp_path / "plain", vocab_size=50) == (2, 50)


def check_ids_of(prefix: Path, cache: Path, vocab_size: int = VOCAB_SIZE) -> None:
    check_ids(prefix, where="data.train[0].path", vocab_size=vocab_size, cache_folder=cache)


@pytest.mark.parametrize("position", [0, 1000, -1])
@pytest.mark.parametrize(("dtype", "wrong"), [(np.uint16, 50_000), (np.int32, VOCAB_SIZE), (np.int32, -1)])
def test_one_id_outside_the_vocabulary_is_found_wherever_it_is(
    copied: Path, tmp_path: Path, monkeypatch, dtype, wrong: int, position: int
):
    """Whatever the manifest says, and in every part of a file that is read in parts."""
    monkeypatch.setattr("dqt_dist.data.indexed._SCANNED_TOKENS", 700)
    ids = np.fromfile(f"{copied}.bin", np.uint16).astype(dtype)
    builder = IndexedDatasetBuilder(f"{copied}.bin", dtype=dtype)
    builder.add_document(ids, [len(ids)])  # type: ignore[arg-type]
    builder.finalize(f"{copied}.idx")
    check_ids_of(copied, tmp_path)  # negative control: the ids of our own tokenizer
    ids[position] = wrong
    builder = IndexedDatasetBuilder(f"{copied}.bin", dtype=dtype)
    builder.add_document(ids, [len(ids)])  # type: ignore[arg-type]
    builder.finalize(f"{copied}.idx")
    for _ in range(2):  # looked at, and known
        with pytest.raises(UserError, match=rf"data\.train\[0\]\.path: .*train\.bin holds token id {wrong}"):
            check_ids_of(copied, tmp_path)


def test_ids_are_read_once_as_long_as_the_file_is_the_same(copied: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    known = Path(f"{copied}.ids.json")
    check_ids_of(copied, cache)
    assert not cache.exists()
    rewrite(known, largest=VOCAB_SIZE)  # which shows who reads it
    with pytest.raises(UserError, match=f"holds token id {VOCAB_SIZE}, but model.vocab_size is {VOCAB_SIZE}"):
        check_ids_of(copied, cache)
    check_ids_of(copied, cache, vocab_size=VOCAB_SIZE + 1)
    os.utime(f"{copied}.bin")
    check_ids_of(copied, cache)
    assert json.loads(known.read_text())["largest"] < VOCAB_SIZE
    known.write_text("[")
    check_ids_of(copied, cache)
    known.unlink()
    known.mkdir()  # nothing can be written there
    check_ids_of(copied, cache)
    (kept,) = cache.iterdir()
    rewrite(kept, smallest=-1)
    with pytest.raises(UserError, match="holds token id -1"):
        check_ids_of(copied, cache)


def index_arrays(copied: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, offsets and document bounds of train.idx, mapped for changes."""
    path, n = f"{copied}.idx", json.loads(Path(f"{copied}.json").read_text())["documents"]
    lengths = np.memmap(path, np.int32, "r+", offset=34, shape=n)
    offsets = np.memmap(path, np.int64, "r+", offset=34 + 4 * n, shape=n)
    return lengths, offsets, np.memmap(path, np.int64, "r+", offset=34 + 12 * n, shape=n + 1)


@pytest.mark.parametrize(
    ("array", "entry", "value", "message"),
    [
        (0, 5, -3, "sequence 5 has -3 tokens"),
        (0, 5, 2**30, "sequence 6 has"),
        (0, -1, -1, "sequence {last} has -1 tokens"),
        (1, 7, -2, "sequence 7 has .* begins at byte -2"),
        (1, 7, 2**40, f"sequence 7 has .* begins at byte {2**40}"),
        (1, 0, 2, "sequence 0 has .* begins at byte 2, where those before it end at byte 0"),
        (2, 3, 1, "document bound 3 is 1"),
        (2, 0, 1, "document bound 0 is 1"),
        (2, -1, 99, "document bound {bounds} is 99"),
        (2, 4, 10**9, "document bound 5 is 5"),
    ],
)
def test_damaged_index_names_file_and_entry(
    copied: Path, monkeypatch, array: int, entry: int, value: int, message: str
):
    monkeypatch.setattr("dqt_dist.data.indexed._INDEX_ENTRIES", 4)  # parts
    assert check(copied)  # negative control
    arrays = index_arrays(copied)
    arrays[array][entry] = value
    arrays[array].flush()  # type: ignore[attr-defined]
    last = len(arrays[0]) - 1
    with pytest.raises(UserError, match=r"train\.idx is damaged: " + message.format(last=last, bounds=last + 1)):
        check(copied)


def test_missing_files_are_named(copied: Path):
    with pytest.raises(UserError, match=r"data\.train\[0\]\.path: neither .*; .* holds .*other, .*train"):
        check(copied.parent / "nothing")
    with pytest.raises(UserError, match=r"holds .*train"):
        check(copied.parent)  # the folder instead of the prefix
    Path(f"{copied}.idx").unlink()
    with pytest.raises(UserError, match=r"train\.idx is missing"):
        check(copied)


def test_truncated_files_give_both_numbers(copied: Path):
    size, idx_size = (os.path.getsize(f"{copied}{suffix}") for suffix in (".bin", ".idx"))
    assert check(copied)  # negative control: the whole file is accepted
    os.truncate(f"{copied}.bin", size - 1000)
    with pytest.raises(UserError, match=rf"has {size - 1000} bytes, .* {size} bytes: the file is cut short"):
        check(copied)
    os.truncate(f"{copied}.bin", size)
    os.truncate(f"{copied}.idx", idx_size - 8)
    with pytest.raises(UserError, match=rf"has {idx_size - 8} bytes, .* {idx_size} bytes"):
        check(copied)
    os.truncate(f"{copied}.idx", 10)
    with pytest.raises(UserError, match=r"not a Megatron index file \(10 bytes\)"):
        check(copied)


def test_vocabulary_above_the_models_gives_both_numbers(copied: Path):
    message = f"prepared with {VOCAB_SIZE} pieces, but model.vocab_size is 599; set model.vocab_size to {VOCAB_SIZE}"
    with pytest.raises(UserError, match=re.escape(message)):
        check(copied, vocab_size=VOCAB_SIZE - 1)
    assert check(copied, vocab_size=VOCAB_SIZE)


def test_another_tokenizer_or_another_preparation_is_refused(copied: Path, prepared):
    manifest = Path(f"{copied}.json")
    tokens = json.loads(manifest.read_text())["tokens"]
    rewrite(manifest, tokenizer_sha256="0" * 64)
    with pytest.raises(UserError, match=r"sha256 0000000000000000\.\.\., but data\.tokenizer"):
        check(copied, tokenizer=prepared.tokenizer)
    rewrite(manifest, tokens=tokens + 1)
    with pytest.raises(UserError, match=f"counts {tokens + 1} tokens, but .* hold {tokens}"):
        check(copied)
    manifest.write_text("{}")
    with pytest.raises(UserError, match="not a manifest"):
        check(copied)


def test_data_without_documents_are_refused(tmp_path: Path, prepared):
    IndexedWriter(tmp_path / "empty", prepared.tokenizer, request="").finish()
    with pytest.raises(UserError, match=r"empty\.bin holds no tokens"):
        check(tmp_path / "empty")


def test_check_files_takes_a_run_whose_files_go_together_and_names_the_one_that_does_not(prepared, copied, tmp_path):
    def data(*prefixes: str) -> DataConfig:
        sources = tuple(DataSource(path=prefix) for prefix in prefixes)
        return DataConfig(train=sources, tokenizer=str(prepared.tokenizer.path))

    check_files(data(prepared.train, prepared.other), VOCAB_SIZE, tmp_path)
    with pytest.raises(UserError, match=r"data\.train\[1\]\.path: neither .*nowhere\.bin"):
        check_files(data(prepared.train, "nowhere"), VOCAB_SIZE, tmp_path)
    with pytest.raises(UserError, match=r"data\.tokenizer: .* set model\.vocab_size to 600 or more"):
        check_files(data(prepared.train), VOCAB_SIZE - 1, tmp_path)
    np.memmap(f"{copied}.bin", np.uint16)[5] = VOCAB_SIZE
    with pytest.raises(UserError, match=rf"data\.train\[1\]\.path: .* token id {VOCAB_SIZE}, but model\.vocab_size"):
        check_files(data(prepared.train, str(copied)), VOCAB_SIZE, tmp_path)
