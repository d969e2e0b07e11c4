"""Reads a checkpoint in one process, without a process group or a model, one logical tensor at a time.

    reader = CheckpointReader(path)
    reader.config, reader.progress                the run that wrote it and how far it was
    reader.tensors["codes/layers.0.mlp.up_proj"]  shape, dtype and sizes, without reading it
    reader.read("codes/layers.0.mlp.up_proj")     the whole matrix, put together from the rectangles of all ranks

Names and meaning of the tensors are those of state.py. The largest tensor bounds the memory, whatever the size of the
model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dqt_dist.checkpoint import folder
from dqt_dist.checkpoint.logical_tensor import LogicalLoadPlanner, LogicalTensor
from dqt_dist.config import Config
from dqt_dist.errors import UserError


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, int]
    dtype: torch.dtype
    num_bytes: int
    """Of its elements."""
    disk_bytes: int
    """In the files, with what torch.save puts around each rectangle."""


class CheckpointReader:
    """A complete checkpoint, open for reading.

    Raises UserError for a path without one, another format version, a damaged manifest or metadata, a missing file or
    one of another size, here and while reading.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = folder.resolve(Path(path))
        self.manifest: dict[str, Any] = folder.read_manifest(self.path)
        folder.check_sizes(self.path, self.manifest)
        self.config = _config(self.manifest, self.path)
        self.progress = folder.progress_of(self.manifest)
        self._storage = FileSystemReader(self.path)
        self._metadata = _metadata(self._storage, self.path)
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.tensors: dict[str, TensorInfo] = _infos(self._metadata)

    def read(self, name: str) -> Tensor:
        """The whole logical tensor `name`, [rows, columns] on the CPU; KeyError when there is none of this name."""
        info = self.tensors[name]
        whole = torch.empty(info.shape, dtype=info.dtype)
        planner = LogicalLoadPlanner()
        planner.set_up_planner({name: LogicalTensor(info.shape, info.dtype, {(0, 0): whole})}, self._metadata, True)
        try:
            self._storage.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # whatever the bytes of a damaged file make of torch.load
            hint = "tools/inspect_ckpt.py --verify names the bad file"
            raise UserError(f"{self.path}: {name} cannot be read ({_first_line(error)}); {hint}") from error
        return whole


def _config(manifest: dict[str, Any], path: Path) -> Config:
    try:
        return Config.model_validate_json(json.dumps(manifest["config"]))
    except ValidationError as error:
        raise UserError(
            f"{path / folder.MANIFEST}: config is not one of this version ({_first_line(error)})"
        ) from error


def _metadata(storage: FileSystemReader, path: Path) -> Metadata:
    """The .metadata file, of which every tensor is covered by its rectangles."""
    try:
        metadata = storage.read_metadata()
        sizes = {name: tensor.size.numel() for name, tensor in metadata.state_dict_metadata.items()}
        stored = {name: sum(c.sizes.numel() for c in t.chunks) for name, t in metadata.state_dict_metadata.items()}
    except Exception as error:  # whatever the bytes of a damaged file make of pickle
        raise UserError(f"{path / '.metadata'}: cannot be read ({_first_line(error)}); use an older one") from error
    short = [name for name in sizes if stored[name] != sizes[name]]
    if short:
        raise UserError(f"{path / '.metadata'}: {short[0]} has {stored[short[0]]} of {sizes[short[0]]} elements")
    return metadata


def _infos(metadata: Metadata) -> dict[str, TensorInfo]:
    """By name, in alphabetical order."""
    on_disk: dict[str, int] = {}
    for index, place in metadata.storage_data.items():
        on_disk[index.fqn] = on_disk.get(index.fqn, 0) + place.length
    infos = {}
    for name, tensor in sorted(metadata.state_dict_metadata.items()):
        assert isinstance(tensor, TensorStorageMetadata), name
        dtype, (rows, columns) = tensor.properties.dtype, tensor.size
        infos[name] = TensorInfo((rows, columns), dtype, rows * columns * dtype.itemsize, on_disk[name])
    return infos


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
