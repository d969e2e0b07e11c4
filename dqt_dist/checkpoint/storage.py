"""The files of torch.distributed.checkpoint, read as data: nothing in them is executed, whoever wrote them.

torch reads `.metadata` by pickle, which calls whatever the file names. Here the file may name the classes that a
checkpoint needs and nothing else, and what it says is checked before memory is taken for it:

    names        of tensors: letters, digits, `.`, `_`, `/`, `-`; of files: those of the manifest
    rectangles   lie in their tensor, do not overlap and cover it; the bytes of each are in its file

A rectangle in a `.distcp` file is a zip archive, as torch.save makes one. Its elements are the record data/0,
uncompressed, row-major, little-endian. The pickle beside the record repeats what `.metadata` says; it is not read.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future
from torch.serialization import _get_layout

from dqt_dist.checkpoint.folder import METADATA
from dqt_dist.errors import UserError

RECORDS = (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    _StorageInfo,
)
"""The classes in .metadata that have fields."""
KINDS: tuple[Any, ...] = (*RECORDS, _MEM_FORMAT_ENCODING, torch.Size, _get_layout)
MAY_BE_NAMED: dict[tuple[str, str], Any] = {(kind.__module__, kind.__name__): kind for kind in KINDS}
MAY_BE_NAMED |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# Where the checkpoint was written, which nobody opens.
MAY_BE_NAMED |= {(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")}

TENSOR_NAME = re.compile(r"[A-Za-z0-9._/-]+")
# In the local header of a zip record: lengths of file name and extra field, 2 bytes each, then both, then the record.
LENGTHS_AT, HEADER_BYTES = 26, 30
Shape = tuple[int, int]


class CheckpointFiles(FileSystemReader):
    """The tensors of a checkpoint whose files agree with `files` of its manifest (folder.py).

    Raises UserError, here and while reading, for metadata and tensors that are not what this project writes.
    """

    def __init__(self, path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(path)
        self.folder = path
        self.metadata = _read(path / METADATA, files)
        self.set_up_storage_reader(self.metadata, is_coordinator=True)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        of_files = defaultdict(list)
        for item in plan.items:
            of_files[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in of_files.items():
            with open(self.folder / name, "rb") as file:
                for item in items:
                    rectangle = self._rectangle(file, item.storage_index)
                    for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        rectangle = rectangle.narrow(axis, start, length)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(rectangle)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _rectangle(self, file: io.BufferedReader, index: MetadataIndex) -> Tensor:
        """The stored rectangle [rows, columns] that begins at `index.offset` of the tensor `index.fqn`."""
        tensor, place = self.metadata.state_dict_metadata[index.fqn], self.storage_data[index]
        assert isinstance(tensor, TensorStorageMetadata)
        sizes = next(chunk.sizes for chunk in tensor.chunks if chunk.offsets == index.offset)
        elements = bytearray(sizes.numel() * tensor.properties.dtype.itemsize)
        if not elements:
            return torch.empty(sizes, dtype=tensor.properties.dtype)
        try:
            with zipfile.ZipFile(_Slice(file, place.offset, place.length)) as archive:
                (record,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
            _require(record.compress_type == zipfile.ZIP_STORED, "its bytes are compressed")
            _require(record.file_size == len(elements), f"it has {record.file_size} bytes, its shape {len(elements)}")
            header = place.offset + record.header_offset
            file.seek(header + LENGTHS_AT)
            lengths = file.read(HEADER_BYTES - LENGTHS_AT)
            file.seek(header + HEADER_BYTES + sum(int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2)))
            _require(file.readinto(elements) == len(elements), "its file ends before it")
        except Exception as error:  # whatever the bytes of a planted file make of zipfile
            offset = tuple(index.offset or ())
            raise UserError(
                f"{self.folder / place.relative_path}: {index.fqn} at {offset} cannot be read ({first_line(error)})"
            ) from error
        return torch.frombuffer(elements, dtype=tensor.properties.dtype).view(sizes)


class _Slice(io.RawIOBase):
    """`length` bytes of an open file as a file for zipfile, which torch's own view of a file does not serve."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.position)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.length - self.position)])
        self.position += count
        return count


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


# ---- .metadata ----


class _Forbidden(Exception):
    """A pickle names what it must not."""


class _Unpickler(pickle._Unpickler):
    """Builds objects of MAY_BE_NAMED only.

    This is pickle's reader in Python. The one in C takes memory for an index of the file before it looks at the file.
    """

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in MAY_BE_NAMED:
            raise _Forbidden(f"names {module!r} {name!r}")
        return MAY_BE_NAMED[module, name]

    def load_build(self) -> None:
        """Sets the fields of an instance; never those of a class, which would outlive the file."""
        if not isinstance(self.stack[-2], RECORDS):  # type: ignore[attr-defined]
            raise _Forbidden(f"sets fields of {type(self.stack[-2])}")  # type: ignore[attr-defined]
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build


def _read(file: Path, files: Mapping[str, Mapping[str, Any]]) -> Metadata:
    """The metadata in `file`, checked; raises UserError."""
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
        _check(metadata, files)
    except _Forbidden as error:
        raise UserError(
            f"{file}: {error}, which no checkpoint has; nothing of it was executed, do not use what comes from there"
        ) from error
    except Exception as error:  # whatever the bytes of a planted file make of pickle and of torch's classes
        raise UserError(f"{file}: cannot be read ({first_line(error)}); use an older checkpoint") from error
    return metadata


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _check(metadata: Any, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises an exception when the metadata are not of whole tensors that lie in `files`."""
    _require(type(metadata) is Metadata, "no metadata of a checkpoint")
    stored_bytes = 0
    for name, tensor in metadata.state_dict_metadata.items():
        _require(TENSOR_NAME.fullmatch(name) is not None, f"{name!r} is not the name of a tensor")
        _require(type(tensor) is TensorStorageMetadata, f"{name} is no tensor")
        dtype, shape = tensor.properties.dtype, _pair(tensor.size)
        _require(type(dtype) is torch.dtype, f"{name} has no dtype")
        rectangles = [(_pair(chunk.offsets), _pair(chunk.sizes)) for chunk in tensor.chunks]
        for offset, sizes in rectangles:
            place = metadata.storage_data[MetadataIndex(name, offset)]
            num_bytes = sizes[0] * sizes[1] * dtype.itemsize
            _check_place(f"{name} at {offset}", place, num_bytes, files)
            stored_bytes += place.length
        _require(_cover(shape, rectangles), f"the rectangles of {name} do not make up its shape {shape}")
    on_disk = sum(entry["bytes"] for entry in files.values())
    _require(stored_bytes <= on_disk, f"the tensors take {stored_bytes} bytes, the files have {on_disk}")


def _check_place(what: str, place: Any, num_bytes: int, files: Mapping[str, Mapping[str, Any]]) -> None:
    _require(type(place) is _StorageInfo and not place.transform_descriptors, f"{what} is not stored plainly")
    _require(place.relative_path in files, f"{what} is in {place.relative_path!r}, which the manifest does not have")
    _require(type(place.offset) is type(place.length) is int, f"{what} has no place in its file")
    size = files[place.relative_path]["bytes"]
    inside = 0 <= place.offset <= place.offset + place.length <= size
    _require(inside, f"{what} is at bytes {place.offset} + {place.length} of a file of {size}")
    _require(num_bytes <= place.length, f"{what} has a shape of {num_bytes} bytes, stored are {place.length}")


def _pair(sizes: Any) -> Shape:
    _require(type(sizes) is torch.Size and len(sizes) == 2 and min(sizes) >= 0, "a tensor does not have two axes")
    return sizes[0], sizes[1]


def _cover(shape: Shape, rectangles: list[tuple[Shape, Shape]]) -> bool:
    """Whether (offset, sizes) are disjoint and make up all of `shape`."""
    area, open_ones = 0, []
    for (top, left), (rows, columns) in sorted(rectangles):
        bottom, right = top + rows, left + columns
        if bottom > shape[0] or right > shape[1]:
            return False
        if rows * columns:
            open_ones = [other for other in open_ones if other[2] > top]  # those above are done with
            if any(left < other_right and other_left < right for other_left, other_right, _ in open_ones):
                return False
            open_ones.append((left, right, bottom))
        area += rows * columns
    return area == shape[0] * shape[1]
