"""A checkpoint as a folder on the disk: its manifest, where a run keeps its checkpoints, whether the files are whole.

    RUN/checkpoints/step_00000200/
        __0_0.distcp ...      tensors, torch.distributed.checkpoint; one file per rank that wrote
        .metadata             where each rectangle of each logical tensor lies
        manifest.json         what this is, and size and sha256 of every other file; written last

A folder named `step_...` with a manifest is complete: writer.py renames it last. The manifest:

    format     2                                   step, tokens, samples   progress; samples is the position in the data
    config     the complete config of the run      layout, versions        of the run that wrote it, for people
    recent_losses      what the next loss is compared with (optim/loss_spikes.py); empty without spike_deviations
    tokenizer_sha256   of the tokenizer that the model was trained with (run_tokenizer.py)
    files      {name: {"bytes": size, "sha256": hexadecimal digest}}
    sha256     of everything above, so that a flipped bit of a number here is found too

Whoever reads a checkpoint compares its files with the manifest first. What is damaged raises DamagedCheckpoint, and
another checkpoint may take its place; what is whole and of another format or model raises a plain UserError.

Nothing here needs a process group or a model: the tools and exports read checkpoints with plain torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqt_dist.errors import UserError
from dqt_dist.json_files import read_json_object
from dqt_dist.progress_line import ProgressLine

MANIFEST = "manifest.json"
METADATA = ".metadata"
RECENT_LOSSES = "recent_losses"
FORMAT_VERSION = 2
STEP_FOLDER = re.compile(r"step_(\d{8})")
# Of a file in the folder itself: no separators, nothing that a terminal would act on.
FILE_NAME = re.compile(r"(?!\.\.?$)[A-Za-z0-9._-]+")
SHA256 = re.compile(r"[0-9a-f]{64}")
READ_BYTES = 1 << 24


class DamagedCheckpoint(UserError):
    """Files that are not what was written: truncated, changed, missing. An older checkpoint may be whole."""


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


def numbered(folder: Path) -> list[Path]:
    """Whatever below `folder` is named like a checkpoint, oldest first: also links, files, folders without manifest."""
    return sorted(path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first."""
    return [path for path in numbered(folder) if (path / MANIFEST).is_file()]


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = STEP_FOLDER.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def unused(path: Path) -> Path:
    """`path`, or where something has this name, the name with `_again` behind it, as often as it takes."""
    while os.path.lexists(path):
        path = path.with_name(f"{path.name}_again")
    return path


def resolve(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest complete one of a run or of its checkpoints folder.

    Raises UserError when there is none, saying what was found instead.
    """
    return [each for each in candidates(path) if (each / MANIFEST).is_file()][-1]


def candidates(path: Path) -> list[Path]:
    """The checkpoints that `path` may mean, oldest first: itself, or all of a run or of its checkpoints folder.

    At least one has a manifest; the others may be anything. Raises UserError when none has one, saying what was found
    instead.
    """
    try:
        return _candidates(path)
    except OSError as error:  # a name too long, a folder that must not be entered
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from error


def _candidates(path: Path) -> list[Path]:
    if (path / MANIFEST).is_file():
        return [path]
    for folder in (path / "checkpoints", path):
        if complete_checkpoints(folder):
            return numbered(folder)
    if not path.exists():
        raise UserError(f"{path}: {'a link to nothing' if path.is_symlink() else 'no such file or folder'}")
    if not path.is_dir():
        raise UserError(f"{path}: a file; a checkpoint is a folder step_NNNNNNNN with a {MANIFEST}")
    if (path / METADATA).exists() or any(path.glob("*.distcp")):
        raise UserError(f"{path}: a half-written checkpoint, {MANIFEST} is missing; use an older one")
    started = [half.name for place in (path, path / "checkpoints") for half in place.glob(".partial_step_*")]
    hint = f"; half-written: {', '.join(sorted(started))}" if started else ""
    raise UserError(f"{path}: no complete checkpoint there (a folder step_NNNNNNNN with {MANIFEST}){hint}")


# ---- the manifest ----


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint `path`.

    Raises DamagedCheckpoint when it is missing or not as it was written, UserError for another format.
    """
    file = path / MANIFEST
    if file.exists() and not file.is_file():  # reading a pipe or a device may have no end
        raise DamagedCheckpoint(f"{file}: not a plain file; use an older checkpoint")
    try:
        manifest = read_json_object(file, "use an older checkpoint")
    except UserError as error:
        raise DamagedCheckpoint(str(error)) from error
    if "format" not in manifest:
        raise DamagedCheckpoint(f"{file}: not a checkpoint manifest, it has no format; use an older checkpoint")
    if manifest["format"] != FORMAT_VERSION:
        raise UserError(f"{path}: checkpoint format {manifest['format']!r}, this version reads {FORMAT_VERSION}")
    if problems := _manifest_problems(manifest):
        raise DamagedCheckpoint(f"{file}: {problems[0]}; the manifest is damaged, use an older checkpoint")
    return manifest


def _manifest_problems(manifest: dict[str, Any]) -> list[str]:
    # Manifests were written without their own digest at first.
    wanted, found = manifest.get("sha256"), manifest_digest(manifest)
    if wanted is not None and wanted != found:
        return [f"its content has sha256 {found}, it says {wanted}"]
    counters = ("step", "tokens", "samples")
    wrong = [name for name in counters if type(manifest.get(name)) is not int or not 0 <= manifest[name] < 2**63]
    wrong += [name for name in ("config", "files") if not isinstance(manifest.get(name), dict)]
    if wrong:
        return [f"{', '.join(wrong)} missing or of the wrong type"]
    losses = manifest.get(RECENT_LOSSES, [])
    if type(losses) is not list or any(type(loss) is not float for loss in losses):
        return [f"{RECENT_LOSSES} is no list of numbers"]
    problems = [f"config.{name} is no section" for name, part in manifest["config"].items() if type(part) is not dict]
    for name, entry in manifest["files"].items():
        if not FILE_NAME.fullmatch(name) or name == MANIFEST:
            problems.append(f"files.{name!r} is not the name of a file in the checkpoint's folder")
        elif not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            problems.append(f"files.{name} has no bytes or sha256")
        elif type(entry["bytes"]) is not int or not SHA256.fullmatch(str(entry["sha256"])):
            problems.append(f"files.{name} has no number of bytes or no sha256 of 64 hexadecimal digits")
    if METADATA not in manifest["files"]:
        problems.append(f"files.{METADATA} is missing")
    return problems


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Hexadecimal SHA-256 of a manifest's content without `sha256`, whatever the order and the layout of its text."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def progress_of(manifest: dict[str, Any]) -> Progress:
    return Progress(manifest["step"], manifest["tokens"], manifest["samples"])


# ---- the files ----


def bad_files(path: Path, files: Mapping[str, dict[str, Any]], progress: ProgressLine | None = None) -> dict[str, str]:
    """What is wrong, by name, with those of `files` (of a manifest) that are not as they were written. Reads them all.

    Size and content are compared; a file of another size is not read.
    """
    problems = {}
    for name, entry in files.items():
        try:
            if problem := _problem(path / name, entry, progress):
                problems[name] = problem
        except OSError as error:
            problems[name] = f"cannot be read: {error}"
    return problems


def _problem(file: Path, entry: dict[str, Any], progress: ProgressLine | None) -> str | None:
    if not file.is_file():
        return f"is missing, the manifest says {entry['bytes']} bytes"
    if (size := file.stat().st_size) != entry["bytes"]:
        return f"has {size} bytes, the manifest says {entry['bytes']} bytes"
    if (found := sha256_of(file, progress)) != entry["sha256"]:
        return f"has another content: sha256 {found}, the manifest says {entry['sha256']}"
    return None


def raise_if_bad(path: Path, problems: Mapping[str, str]) -> None:
    """Raises DamagedCheckpoint that names every bad file of the checkpoint `path`."""
    if problems:
        lines = [f"  {name} {what}" for name, what in sorted(problems.items())]
        raise DamagedCheckpoint("\n".join([f"{path}: {len(problems)} bad file(s)", *lines]))


def sha256_of(file: Path, progress: ProgressLine | None = None) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while piece := handle.read(READ_BYTES):
            digest.update(piece)
            if progress is not None:
                progress.update(len(piece))
    return digest.hexdigest()


def check_files(path: Path, manifest: dict[str, Any], others: Mapping[str, str] | None = None) -> int:
    """Compares the files of a checkpoint with its manifest, in one process; returns the bytes that were checked.

    Raises DamagedCheckpoint naming each file that is missing, of another size or of other content, and `others` that
    are known to be wrong. A progress bar on stderr.
    """
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    with ProgressLine(desc="verify", total=total, unit="B", unit_scale=True) as progress:
        problems = bad_files(path, manifest["files"], progress)
    raise_if_bad(path, {**problems, **(others or {})})
    return total


def verify(path: Path) -> int:
    """`check_files`, and the folder must hold nothing else."""
    manifest = read_manifest(path)
    others = {other.name for other in path.iterdir()} - manifest["files"].keys() - {MANIFEST}
    return check_files(path, manifest, dict.fromkeys(others, "is not in the manifest"))
