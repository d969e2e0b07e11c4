"""safetensors files, written one tensor at a time and cut into shards.

    file     8 bytes little-endian length of the header | header, JSON, padded with spaces | tensors without gaps
    header   {"__metadata__": {"format": "pt"}, name: {"dtype": "BF16", "shape": [..],
             "data_offsets": [begin, end]}, ..}

The safetensors library writes a whole dictionary of tensors in memory. An `Entry` knows shape and dtype before its
tensor exists: the header comes first, then each tensor is made, written and dropped. Above `shard_bytes` the names of
the files and the index are those of transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SHARD_BYTES = 5 * 10**9
"""Size above which a model is cut into several files, as transformers does."""

NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Entry:
    """A tensor that a file will hold, and how to make it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def raw_bytes(self) -> memoryview:
        """Makes the tensor; its elements in row-major order, little-endian."""
        tensor = self.make()
        assert (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype), (self.name, tensor.shape)
        return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def write_model(
    folder: Path, entries: list[Entry], progress: Callable[[list[Entry]], Iterable[Entry]], shard_bytes: int
) -> None:
    """Writes model.safetensors, or shards and their index. `progress` wraps the walk over the entries."""
    shards = _shards(entries, shard_bytes)
    walk = iter(progress([entry for shard in shards for entry in shard]))
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], walk)
    else:
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_file(folder / name, shard, walk)
            weight_map |= {entry.name: name for entry in shard}
        index = {
            "metadata": {"total_size": sum(entry.num_bytes for entry in entries)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    # Lets a progress bar come to its end.
    assert next(iter(walk), None) is None


def _shards(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Entries in order, each shard at most `shard_bytes` unless one tensor alone is larger."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.num_bytes
    # Widest elements first keeps every tensor aligned, as the library does it.
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in shards]


def _write_file(path: Path, shard: list[Entry], walk: Iterable[Entry]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in shard:
        end = position + entry.num_bytes
        header[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, _ in zip(shard, walk, strict=False):
            file.write(entry.raw_bytes())


def tensor_bytes(folder: Path) -> int:
    """Bytes of tensors in all safetensors files of a folder, headers not counted."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        total += path.stat().st_size - 8 - header
    return total
