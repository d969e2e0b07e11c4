"""A checkpoint as a folder on the disk: its manifest, where a run keeps its checkpoints, whether the files are whole.

    RUN/checkpoints/step_00000200/
        __0_0.distcp ...      tensors, torch.distributed.checkpoint; one file per rank that wrote
        .metadata             where each rectangle of each logical tensor lies
        manifest.json         what this is, and size and sha256 of every other file; written last

A folder named `step_...` with a manifest is complete: writer.py renames it last. The manifest:

    format     2                                   step, tokens, samples   progress; samples is the position in the data
    config     the complete config of the run      layout, versions        of the run that wrote it, for people
    tokenizer_sha256   of the tokenizer that the model was trained with (run_tokenizer.py)
    files      {name: {"bytes": size, "sha256": hexadecimal digest}}

Nothing here needs a process group or a model: the tools and exports read checkpoints with plain torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dqt_dist.errors import UserError

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
STEP_FOLDER = re.compile(r"step_(\d{8})")
READ_BYTES = 1 << 24


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int
    """Optimizer steps made."""
    tokens: int
    """Tokens trained on."""
    samples: int
    """Samples of the training set consumed: the next step begins with this one."""


# ---- finding ----


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first."""
    found = [path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found)


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = STEP_FOLDER.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def resolve(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run or of its checkpoints folder.

    Raises UserError when there is none, saying what was found instead.
    """
    if (path / MANIFEST).is_file():
        return path
    found = complete_checkpoints(path / "checkpoints") or complete_checkpoints(path)
    if found:
        return found[-1]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        raise UserError(f"{path}: a file; a checkpoint is a folder step_NNNNNNNN with a {MANIFEST}")
    if (path / ".metadata").exists() or any(path.glob("*.distcp")):
        raise UserError(f"{path}: a half-written checkpoint, {MANIFEST} is missing; use an older one")
    started = [half.name for place in (path, path / "checkpoints") for half in place.glob(".partial_step_*")]
    hint = f"; half-written: {', '.join(sorted(started))}" if started else ""
    raise UserError(f"{path}: no complete checkpoint there (a folder step_NNNNNNNN with {MANIFEST}){hint}")


# ---- the manifest ----


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint `path`. Raises UserError for a damaged one, a foreign one or another format."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a checkpoint manifest ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: checkpoint format {version!r}, this version reads {FORMAT_VERSION}")
    keys = {"step": int, "tokens": int, "samples": int, "config": dict, "files": dict}
    wrong = [name for name, kind in keys.items() if not isinstance(manifest.get(name), kind)]
    if wrong:
        raise UserError(f"{file}: {', '.join(wrong)} missing or of the wrong type; the manifest is damaged")
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise UserError(f"{file}: files.{name} has no bytes or sha256; the manifest is damaged")
    return manifest


def progress_of(manifest: dict[str, Any]) -> Progress:
    return Progress(manifest["step"], manifest["tokens"], manifest["samples"])


# ---- the files ----


def wrong_sizes(path: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of each file that is missing or has another size than the manifest says; reads none."""
    for name, entry in manifest["files"].items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size is None:
            yield name, f"is missing, the manifest says {entry['bytes']} bytes"
        elif size != entry["bytes"]:
            yield name, f"has {size} bytes, the manifest says {entry['bytes']} bytes"


def check_sizes(path: Path, manifest: dict[str, Any]) -> None:
    """Raises UserError naming every file that is missing or has another size: the quick check before loading."""
    problems = [f"{path / name}: {what}" for name, what in wrong_sizes(path, manifest)]
    if problems:
        raise UserError("\n".join([*problems, "the checkpoint is damaged; use an older one"]))


def sha256_of(file: Path, progress: tqdm | None = None) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while piece := handle.read(READ_BYTES):
            digest.update(piece)
            if progress is not None:
                progress.update(len(piece))
    return digest.hexdigest()


def verify(path: Path) -> int:
    """Reads every file of a checkpoint and compares it with the manifest; returns the bytes that were checked.

    Raises UserError naming each file that is missing, of another size, of other content, or not in the manifest.
    """
    files = (manifest := read_manifest(path))["files"]
    problems = dict(wrong_sizes(path, manifest))
    whole = [name for name in files if name not in problems]
    total = sum(files[name]["bytes"] for name in whole)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as progress:
        for name in whole:
            found, wanted = sha256_of(path / name, progress), files[name]["sha256"]
            if found != wanted:
                problems[name] = f"has another content: sha256 {found}, the manifest says {wanted}"
    for extra in sorted(path.iterdir()):
        if extra.name not in files and extra.name != MANIFEST:
            problems[extra.name] = "is not in the manifest"
    if problems:
        lines = [f"  {name} {what}" for name, what in sorted(problems.items())]
        raise UserError("\n".join([f"{path}: {len(problems)} bad file(s)", *lines]))
    return total
