"""Layouts of the Hugging Face formats: the engines' own packers make the same bytes, and unpacking gives the codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.bitnet import pack_weights

from dqt_dist.export import bitnet, compressed
from dqt_dist.export.safetensors_writer import Entry, tensor_bytes, write_model


def random_codes(bits: int, rows: int = 12, columns: int = 70) -> Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8)


def test_bitnet_bytes_are_those_of_transformers() -> None:
    codes = torch.randint(-1, 2, (24, 10), dtype=torch.int8)
    packed = bitnet.pack_rows(codes)
    assert torch.equal(packed, pack_weights(codes.clone()))  # which adds 1 to its argument
    assert torch.equal(bitnet.unpack_rows(packed), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_words_are_those_of_compressed_tensors(bits: int) -> None:
    """70 columns: for odd bits codes cross the borders of words, and the last word of a row is not full."""
    codes = random_codes(bits)
    words = compressed.pack_words(codes, bits)
    assert words.shape == (12, compressed.packed_columns(70, bits))
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(compressed.unpack_words(words, bits, 70), codes)


def test_rows_packed_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(3)
    whole = compressed.pack_words(codes, 3)
    monkeypatch.setattr(compressed, "ROWS_AT_ONCE", 5)
    assert torch.equal(compressed.pack_words(codes, 3), whole)


# ---- safetensors ----

TENSORS = {
    "a": torch.arange(6, dtype=torch.uint8).view(2, 3),
    "b": torch.randn(3, 5),
    "c": torch.randn(4).bfloat16(),
    "d": torch.tensor([3, 4]),
    "e": torch.randint(-5, 5, (2, 2), dtype=torch.int32),
    "f": torch.randint(-5, 5, (7,), dtype=torch.int8),
}


def entries() -> list[Entry]:
    return [Entry(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in TENSORS.items()]


def test_one_file_is_read_by_the_library_and_as_long_as_its_own(tmp_path: Path) -> None:
    write_model(tmp_path, entries(), lambda all: all, shard_bytes=10**9)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    (tmp_path / "theirs").mkdir()
    save_file(TENSORS, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    assert tensor_bytes(tmp_path) == tensor_bytes(tmp_path / "theirs") == sum(entry.num_bytes for entry in entries())


@pytest.mark.parametrize("shard_bytes", [1, 30, 70])
def test_shards_hold_every_tensor_once_and_the_index_names_them(tmp_path: Path, shard_bytes: int) -> None:
    write_model(tmp_path, entries(), lambda all: all, shard_bytes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(entry.num_bytes for entry in entries())
    assert index["weight_map"].keys() == TENSORS.keys()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert {path.name for path in files} == set(index["weight_map"].values()) and len(files) > 1
    for path in files:
        found = load_file(path)
        assert all(index["weight_map"][name] == path.name and torch.equal(found[name], TENSORS[name]) for name in found)
        assert len(found) == 1 or sum(t.nbytes for t in found.values()) <= shard_bytes
