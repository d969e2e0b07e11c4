"""Checkpoint folders: written whole or not at all, found again, read back.

    RUN/checkpoints/step_00000200/
        __0_0.distcp ...      tensors, torch.distributed.checkpoint
        .metadata             where each rectangle of each logical tensor lies
        manifest.json         step, config, layout, versions, size of every file; written last

A save goes to `.partial_step_...`; only when every rank has written, the manifest stands and everything is on the disk is the
folder renamed. A folder named `step_...` is therefore complete, and an interrupted save leaves the older ones as they were.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dqt_dist.checkpoint.logical_tensor import LogicalLoadPlanner, LogicalSavePlanner, LogicalState
from dqt_dist.checkpoint.state import after_load, logical_state
from dqt_dist.config import Config
from dqt_dist.errors import UserError
from dqt_dist.parallel.engine import CombinedOptimizer

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
STEP_FOLDER = re.compile(r"step_(\d{8})")
# Fields that say what the state IS; a checkpoint with others is of another model.
IDENTITY = {"model": None, "quantization": ("method", "bits", "embeddings"), "optimizer": ("name",)}


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int
    tokens: int


def checkpoints_folder(config: Config) -> Path:
    return Path(config.checkpoint.dir) / "checkpoints"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first."""
    found = [path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found)


def save(
    chunks: nn.Module, optimizer: CombinedOptimizer, config: Config, progress: Progress, facts: dict[str, Any]
) -> Path:
    """Writes a checkpoint atomically and drops the oldest beyond checkpoint.keep_last. A collective call.

    `facts` (layout, versions) go into the manifest as they are.
    """
    folder = checkpoints_folder(config)
    final, partial = folder / f"step_{progress.step:08d}", folder / f".partial_step_{progress.step:08d}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".partial_step_*"):
            shutil.rmtree(left_over)
        partial.mkdir()
    dist.barrier()
    dcp_save(
        logical_state(chunks, optimizer),
        storage_writer=FileSystemWriter(partial, single_file_per_rank=True, sync_files=True),
        planner=LogicalSavePlanner(),
    )
    dist.barrier()
    if dist.get_rank() == 0:
        _write_manifest(partial, config, progress, facts)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(folder)
        for old in complete_checkpoints(folder)[: -config.checkpoint.keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def _write_manifest(folder: Path, config: Config, progress: Progress, facts: dict[str, Any]) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = {
        "format": FORMAT_VERSION,
        "step": progress.step,
        "tokens": progress.tokens,
        **facts,
        "config": config.model_dump(mode="json"),
        "files": sizes,
    }
    with open(folder / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find(config: Config, resume: str) -> Path | None:
    """The checkpoint `--resume` means: None for `none`, and for `auto` when there is none yet.

    A path may be a checkpoint, a run or its checkpoints folder (then its newest). Raises UserError when it holds none.
    """
    if resume == "none":
        return None
    if resume == "auto":
        found = complete_checkpoints(checkpoints_folder(config))
        return found[-1] if found else None
    path = Path(resume)
    if (path / MANIFEST).is_file():
        return path
    found = complete_checkpoints(path / "checkpoints") or complete_checkpoints(path)
    if not found:
        raise UserError(f"--resume {resume}: no complete checkpoint there (a folder step_NNNNNNNN with {MANIFEST})")
    return found[-1]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises UserError for a damaged or foreign one, or when a file has another size."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / MANIFEST}: not a checkpoint manifest ({error})") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: checkpoint format {version}, this version reads {FORMAT_VERSION}")
    for name, size in files.items():
        actual = (path / name).stat().st_size if (path / name).exists() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise UserError(f"{path / name}: {found}, the manifest says {size} bytes; resume from an older checkpoint")
    return manifest


def check_identity(manifest: dict[str, Any], config: Config, path: Path) -> None:
    """Raises UserError naming every field in which the checkpoint's model differs from the config's."""
    saved, current = manifest["config"], config.model_dump(mode="json")
    differing = []
    for section, fields in IDENTITY.items():
        for name in fields or current[section]:
            old, new = saved[section].get(name), current[section][name]
            if old != new:
                differing.append(f"{section}.{name}: the checkpoint has {old!r}, the config {new!r}")
    if differing:
        raise UserError(
            f"{path}: made for another model; set these alike or use --resume none\n" + "\n".join(differing)
        )


def load(path: Path, chunks: nn.Module, optimizer: CombinedOptimizer, config: Config) -> Progress:
    """Restores everything in place, whatever layout wrote it. A collective call.

    Raises UserError for a damaged checkpoint, one of another model, or one with missing or extra tensors.
    """
    manifest = read_manifest(path)
    check_identity(manifest, config, path)
    state = logical_state(chunks, optimizer)
    reader = FileSystemReader(path)
    _check_names(state, set(reader.read_metadata().state_dict_metadata), path)
    dcp_load(state, storage_reader=reader, planner=LogicalLoadPlanner())
    after_load(optimizer, manifest["step"])
    return Progress(manifest["step"], manifest["tokens"])


def _check_names(state: LogicalState, saved: set[str], path: Path) -> None:
    """Every tensor must be restored: nothing is skipped in silence."""
    of_ranks: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(of_ranks, set(state))
    wanted = set().union(*of_ranks)
    problems = [f"{name}: in this run, not in the checkpoint" for name in sorted(wanted - saved)]
    problems += [f"{name}: in the checkpoint, not in this run" for name in sorted(saved - wanted)]
    if problems:
        raise UserError(f"{path}: {len(problems)} tensors do not match\n" + "\n".join(problems[:20]))
