"""One number for the state of a run. Two states have the same number if and only if every bit of them is equal. Neither
the process grid nor the split into files changes it.

    tensor      SHA-256 of   a JSON line [name, dtype, [rows, columns]], then the bytes of the whole tensor, row-major,
                             little-endian; packed codes as they are stored (lowbit/packing.py)
    part        SHA-256 of   the 32-byte digests of its tensors, in alphabetical order of their names
      codes       codes/*                     scales      scale/*
      latents     latent/* and latent_scale/*
      moments     low_bit.*                   parameters  parameter/* and parameter.*
      progress    one JSON line {"step": .., "tokens": .., "samples": ..} in place of tensors
    total       SHA-256 of   the 32-byte digests of the parts in the order above: codes, scales, latents, moments,
                             parameters, progress

A run without latents has no part latents.

Config, versions, dates and the number of files are not state: the digest leaves them out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dqt_dist.checkpoint.folder import Progress
from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.progress_line import ProgressLine

PARTS = {
    "codes": ("codes/",),
    "scales": ("scale/",),
    "latents": ("latent/", "latent_scale/"),
    "moments": ("low_bit.",),
    "parameters": ("parameter/", "parameter."),
}
"""Parts made of tensors, and how the names of theirs begin."""


@dataclass(frozen=True)
class Digest:
    """Hexadecimal SHA-256 digests of a state."""

    parts: dict[str, str]
    """Of codes, scales, latents (where there are any), moments, parameters, progress, in this order."""

    @property
    def total(self) -> str:
        return hashlib.sha256(b"".join(map(bytes.fromhex, self.parts.values()))).hexdigest()


def part_of(name: str) -> str:
    """The part a tensor belongs to; raises ValueError for a name that no part has, so that no state goes unseen."""
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes):
            return part
    raise ValueError(f"{name}: belongs to no part of the digest, {PARTS}")


def tensor_digest(name: str, tensor: Tensor) -> bytes:
    """SHA-256 of one whole tensor [rows, columns] on the CPU."""
    header = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
    digest = hashlib.sha256(f"{header}\n".encode())
    # The machines torch runs on are little-endian, so memory is the canonical order already.
    digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.digest()


def digest(tensors: Iterable[tuple[str, Tensor]], progress: Progress) -> Digest:
    """The digest of whole logical tensors by name, in any order, one held at a time."""
    found: dict[str, dict[str, bytes]] = {part: {} for part in PARTS}
    for name, tensor in tensors:
        found[part_of(name)][name] = tensor_digest(name, tensor)
    if not found["latents"]:
        del found["latents"]
    parts = {part: _sha256(b"".join(of_names[name] for name in sorted(of_names))) for part, of_names in found.items()}
    counters = {"step": progress.step, "tokens": progress.tokens, "samples": progress.samples}
    return Digest(parts | {"progress": _sha256(json.dumps(counters).encode() + b"\n")})


def digest_of(reader: CheckpointReader) -> Digest:
    """The digest of a checkpoint; a progress bar on stderr, raises UserError for damaged files."""
    total = sum(info.num_bytes for info in reader.tensors.values())
    with ProgressLine(desc="digest", total=total, unit="B", unit_scale=True) as bar:

        def tensors() -> Iterable[tuple[str, Tensor]]:
            for name, info in reader.tensors.items():
                yield name, reader.read(name)
                bar.update(info.num_bytes)

        return digest(tensors(), reader.progress)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
