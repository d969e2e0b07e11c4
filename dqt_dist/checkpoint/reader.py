"""Reads a checkpoint in one process, without a process group or a model, one logical tensor at a time.

    reader = CheckpointReader(path)
    reader.config, reader.progress                the run that wrote it and how far it was
    reader.tensors["codes/layers.0.mlp.up_proj"]  shape, dtype and sizes, without reading it
    reader.read("codes/layers.0.mlp.up_proj")     the whole matrix, put together from the rectangles of all ranks

Names and meaning of the tensors are those of state.py. Every file is compared with the manifest before it is used
(folder.py), and none can execute anything (storage.py). The largest tensor bounds the memory, whatever the size of the
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
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from dqt_dist.checkpoint import folder
from dqt_dist.checkpoint.logical_tensor import LogicalLoadPlanner, LogicalTensor
from dqt_dist.checkpoint.storage import CheckpointFiles, first_line
from dqt_dist.config import Config
from dqt_dist.errors import UserError

PACKED = (torch.uint8, torch.int8)
FLOATS = (torch.float32,)
SCALES = ("scale/", "latent_scale/")
DTYPES = {"codes/": PACKED, "latent/": PACKED, "low_bit.": PACKED + FLOATS, "parameter/": FLOATS, "parameter.": FLOATS}
DTYPES |= dict.fromkeys(SCALES, FLOATS)
"""Dtypes of the tensors of state.py, by how their names begin."""


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

    Raises UserError for a path without one, another format version, a file that is not as it was written, and for
    tensors that are none of a run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = folder.resolve(Path(path))
        self.manifest: dict[str, Any] = folder.read_manifest(self.path)
        self.config = _config(self.manifest, self.path)
        self.progress = folder.progress_of(self.manifest)
        folder.check_files(self.path, self.manifest)
        self._files = CheckpointFiles(self.path, self.manifest["files"])
        self.tensors: dict[str, TensorInfo] = _infos(self._files.metadata, self.path)

    def read(self, name: str) -> Tensor:
        """The whole logical tensor `name`, [rows, columns] on the CPU; UserError when there is none of this name."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: has no tensor {name}, which a run of its config has")
        info = self.tensors[name]
        whole = torch.empty(info.shape, dtype=info.dtype)
        planner = LogicalLoadPlanner()
        planner.set_up_planner({name: LogicalTensor(info.shape, info.dtype, {(0, 0): whole})}, self._files.metadata)
        self._files.read_data(planner.create_local_plan(), planner).wait()
        return whole


def _config(manifest: dict[str, Any], path: Path) -> Config:
    try:
        return Config.model_validate_json(json.dumps(manifest["config"]))
    except ValidationError as error:
        raise UserError(f"{path / folder.MANIFEST}: config is not one of this version ({first_line(error)})") from error


def _infos(metadata: Metadata, path: Path) -> dict[str, TensorInfo]:
    """By name, in alphabetical order. Raises UserError for a tensor that state.py does not have."""
    infos = {}
    for name, tensor in sorted(metadata.state_dict_metadata.items()):
        assert isinstance(tensor, TensorStorageMetadata), name
        dtype, (rows, columns) = tensor.properties.dtype, tensor.size
        dtypes = next((dtypes for kind, dtypes in DTYPES.items() if name.startswith(kind)), ())
        if dtype not in dtypes or (name.startswith(SCALES) and (rows, columns) != (1, 1)):
            raise UserError(f"{path / folder.METADATA}: {name} is {dtype} [{rows}, {columns}], which no run has")
        places = (metadata.storage_data[MetadataIndex(name, chunk.offsets)] for chunk in tensor.chunks)
        num_bytes = rows * columns * dtype.itemsize
        infos[name] = TensorInfo((rows, columns), dtype, num_bytes, sum(place.length for place in places))
    return infos
