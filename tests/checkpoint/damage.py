"""Ways to damage a checkpoint's files, by accident and with intent."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dqt_dist.checkpoint.folder import MANIFEST, METADATA, manifest_digest


def flip(file: Path, position: int = -40) -> None:
    """One bit of one byte."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def truncate(file: Path, left_out: int = 1) -> None:
    os.truncate(file, file.stat().st_size - left_out)


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """Another manifest, with the right digests of itself and of the files as they are now."""
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    for name in manifest["files"].keys() & {file.name for file in path.iterdir()}:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}))


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder")


ACCIDENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "data truncated": (lambda path: truncate(path / "__0_0.distcp"), "__0_0.distcp has "),
    "data flipped": (lambda path: flip(path / "__1_0.distcp"), "__1_0.distcp has another content: sha256 "),
    "data empty": (lambda path: (path / "__0_0.distcp").write_bytes(b""), "__0_0.distcp has 0 bytes"),
    "data missing": (lambda path: (path / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "metadata flipped": (lambda path: flip(path / METADATA), ".metadata has another content: sha256 "),
    "metadata missing": (lambda path: (path / METADATA).unlink(), ".metadata is missing"),
    "manifest truncated": (lambda path: truncate(path / MANIFEST, 9), "not JSON"),
    "manifest empty": (lambda path: (path / MANIFEST).write_bytes(b""), "not JSON"),
    "manifest flipped": (
        lambda path: flip(path / MANIFEST, path.joinpath(MANIFEST).read_text().index("rope_base")),
        "",
    ),
    "manifest missing": (lambda path: (path / MANIFEST).unlink(), "cannot be read"),
    "a file in its place": (replace_by_file, "cannot be read"),
    "a copy of an older one": (lambda path: rewrite_manifest(path, step=5), "a copy, its manifest is of step 5"),
}
"""What happens to a checkpoint of step 10 by two ranks, and what the message says of it."""


class Payload:
    """Unpickling it makes the folder `marker`: code of whoever wrote the pickle has run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def plant(path: Path, marker: Path) -> None:
    """Puts a payload into the metadata of a checkpoint, and everything else is as it should be."""
    metadata = pickle.loads((path / METADATA).read_bytes())
    metadata.planner_data = Payload(marker)
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    rewrite_manifest(path)
