"""Saving and resuming a run: from model and optimizer to checkpoint folders and back.

state.py says what is saved, writer.py how, folder.py what a folder holds. A checkpoint is compared with its manifest
before anything of it is used; the ranks share this work. Loading restores every tensor in place, whatever process grid
wrote it, and refuses a checkpoint of another model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from dqt_dist.checkpoint.collective import on_all_ranks, on_first_rank
from dqt_dist.checkpoint.folder import (
    DamagedCheckpoint,
    Progress,
    bad_files,
    candidates,
    numbered,
    progress_of,
    raise_if_bad,
    read_manifest,
    step_of,
    unused,
)
from dqt_dist.checkpoint.logical_tensor import LogicalLoadPlanner, LogicalState
from dqt_dist.checkpoint.run_tokenizer import check_tokenizer
from dqt_dist.checkpoint.state import logical_state
from dqt_dist.checkpoint.storage import CheckpointFiles
from dqt_dist.checkpoint.writer import CheckpointWriter, Retention
from dqt_dist.config import Config
from dqt_dist.data.tokenizer import Tokenizer
from dqt_dist.errors import UserError
from dqt_dist.optim.engine import CombinedOptimizer
from dqt_dist.parallel.groups import collective_timeout

# Fields that say what the state IS; a checkpoint with others is of another model.
IDENTITY = {
    "model": None,
    "quantization": ("method", "bits", "embeddings", "latent_bits"),
    "optimizer": ("name", "state_bits", "second_moment"),
}
# What a field was before there was one; checkpoints of then do not name it.
BEFORE = {"state_bits": 32, "second_moment": "full"}


def checkpoints_folder(config: Config) -> Path:
    return Path(config.checkpoint.dir) / "checkpoints"


# ---- saving ----


def open_writer(config: Config) -> CheckpointWriter:
    """The writer of a run's checkpoints; a collective call. Close it before the process group goes."""
    checkpoint = config.checkpoint
    retention = Retention(checkpoint.keep_last, checkpoint.keep_every)
    return CheckpointWriter(
        checkpoints_folder(config), retention, checkpoint.async_save, timeout=collective_timeout(config)
    )


def save(
    writer: CheckpointWriter,
    model_chunks: nn.Module,
    optimizer: CombinedOptimizer,
    config: Config,
    progress: Progress,
    provenance: dict[str, Any],
) -> None:
    """Saves all state as it is now; training may go on when this returns. A collective call.

    `provenance` (layout, versions) goes into the manifest as it is.
    """
    writer.save(
        logical_state(model_chunks, optimizer), progress, {**provenance, "config": config.model_dump(mode="json")}
    )


# ---- resuming ----


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of which every file is as its manifest says."""

    path: Path
    manifest: dict[str, Any]
    damaged: dict[Path, str] = field(default_factory=dict)
    """Newer ones of the run that `find` passed over, and what is wrong with each."""


def find(config: Config, resume: str) -> Checkpoint | None:
    """The checkpoint `--resume` means: None for `none`, and for `auto` when there is none yet. A collective call.

    `auto` is the newest one of the run that is whole. So is the path of another run, or of its checkpoints folder. The
    path of a checkpoint means this one, which must be whole. Raises UserError when there is none.
    """
    if resume == "none":
        return None
    if resume == "auto":
        paths = on_first_rank(lambda: numbered(checkpoints_folder(config)))
    else:
        paths = on_first_rank(lambda: candidates(Path(resume)))
        if paths == [Path(resume)]:
            return opened(paths[0])
    damaged: dict[Path, str] = {}
    for path in reversed(paths):
        try:
            found = opened(path)
            if step_of(path) != found.manifest["step"]:
                raise DamagedCheckpoint(f"{path}: a copy, its manifest is of step {found.manifest['step']}")
            return replace(found, damaged=damaged)
        except DamagedCheckpoint as error:
            damaged[path] = str(error)
    if damaged:
        raise UserError("\n".join([*damaged.values(), "no checkpoint is whole; --resume none begins anew"]))
    return None


def is_own(config: Config, checkpoint: Checkpoint) -> bool:
    """Whether `checkpoint` is in the run's folder; either of the two may be a link."""
    folder, path = checkpoints_folder(config).resolve(), checkpoint.path
    return folder in (path.parent.resolve(), path.resolve().parent)


def opened(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`, compared with its manifest: the ranks read a share of the files each.

    Raises DamagedCheckpoint on all ranks, naming every file that is missing or not as it was written, UserError for
    another format. A collective call.
    """
    manifest = on_first_rank(lambda: read_manifest(path))
    share = shares(manifest["files"], dist.get_world_size())[dist.get_rank()]
    of_ranks = on_all_ranks(lambda: bad_files(path, share))
    raise_if_bad(path, {name: what for problems in of_ranks for name, what in problems.items()})
    return Checkpoint(path, manifest)


def shares(files: dict[str, dict[str, Any]], number: int) -> list[dict[str, dict[str, Any]]]:
    """`files` of a manifest in `number` parts of about equal bytes: the largest first, each to the smallest part."""
    parts: list[dict[str, dict[str, Any]]] = [{} for _ in range(number)]
    sizes = [0] * number
    for name, entry in sorted(files.items(), key=lambda file: (-file[1]["bytes"], file[0])):
        smallest = sizes.index(min(sizes))
        parts[smallest][name] = entry
        sizes[smallest] += entry["bytes"]
    return parts


def set_aside(config: Config, checkpoint: Checkpoint) -> list[str]:
    """Renames the run folder's checkpoints that are no longer the run's: the damaged ones that `find` passed over, and
    those of later steps, which the run will compute anew.

    Otherwise --resume auto would take them up again after the next interruption. Nothing is deleted: `step_N` becomes
    `left_step_N`. The damaged ones of another run stay as they are. Returns a line for each; on the first rank, before
    anything is written. A collective call.
    """
    damaged = {path.name: "; ".join(map(str.strip, why.splitlines())) for path, why in checkpoint.damaged.items()}

    def rename() -> list[str]:
        if not is_own(config, checkpoint):
            return [f"{why}; passed over" for why in damaged.values()]
        lines = []
        for path in numbered(checkpoints_folder(config)):
            why = damaged.get(path.name)
            if why is None and step_of(path) <= checkpoint.manifest["step"]:
                continue
            aside = path.rename(unused(path.with_name(f"left_{path.name}")))
            lines.append(f"{why or f'{path}: a later checkpoint'}; set aside as {aside.name}")
        return lines

    return on_first_rank(rename)


def start_of(checkpoint: Checkpoint | None) -> Progress:
    """The progress at which a run begins: that of `checkpoint`, or zero without one."""
    return Progress(0, 0, 0) if checkpoint is None else progress_of(checkpoint.manifest)


def check_tokenizer_of(checkpoint: Checkpoint | None, tokenizer: Tokenizer) -> None:
    """Raises UserError when `checkpoint` was trained with another tokenizer than that of data.tokenizer."""
    if checkpoint is not None:
        path = checkpoint.path
        check_tokenizer(tokenizer, checkpoint.manifest, path, path.parent.parent, where="data.tokenizer")


def load(checkpoint: Checkpoint, model_chunks: nn.Module, optimizer: CombinedOptimizer, config: Config) -> Progress:
    """Restores everything in place, whatever layout wrote it. A collective call.

    Raises UserError for a checkpoint of another model, or one with missing, extra or differing tensors.
    """
    check_identity(checkpoint.manifest, config, checkpoint.path)
    state = logical_state(model_chunks, optimizer)
    files = CheckpointFiles(checkpoint.path, checkpoint.manifest["files"])
    _check_tensors(state, files.metadata, checkpoint.path)
    try:
        dcp_load(state, storage_reader=files, planner=LogicalLoadPlanner())
    except CheckpointException as failed:
        for error, _ in failed.failures.values():
            if isinstance(error, UserError):
                raise error from failed
        raise
    progress = progress_of(checkpoint.manifest)
    optimizer.state_was_loaded(progress.step)
    return progress


def check_identity(manifest: dict[str, Any], config: Config, path: Path) -> None:
    """Raises UserError naming every field in which the checkpoint's model differs from the config's."""
    saved, current = manifest["config"], config.model_dump(mode="json")
    differing = []
    for section, fields in IDENTITY.items():
        for name in fields or current[section]:
            old, new = saved.get(section, {}).get(name, BEFORE.get(name)), current[section][name]
            if old != new:
                differing.append(f"{section}.{name}: the checkpoint has {old!r}, the config {new!r}")
    if differing:
        raise UserError(
            f"{path}: made for another model; set these alike or use --resume none\n" + "\n".join(differing)
        )


def _check_tensors(state: LogicalState, metadata: Metadata, path: Path) -> None:
    """Every tensor must be restored, in its shape and dtype: nothing is skipped in silence. A collective call."""

    def described(shape: tuple[int, ...], dtype: torch.dtype) -> str:
        return f"{str(dtype).removeprefix('torch.')} {list(shape)}"

    saved = {
        name: described(tensor.size, tensor.properties.dtype)
        for name, tensor in metadata.state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    of_ranks = on_all_ranks(lambda: {name: described(tensor.shape, tensor.dtype) for name, tensor in state.items()})
    wanted = {name: what for of_rank in of_ranks for name, what in of_rank.items()}
    problems = [f"{name}: in this run, not in the checkpoint" for name in sorted(wanted.keys() - saved.keys())]
    problems += [f"{name}: in the checkpoint, not in this run" for name in sorted(saved.keys() - wanted.keys())]
    problems += [
        f"{name}: the checkpoint has {saved[name]}, this run {wanted[name]}"
        for name in sorted(wanted.keys() & saved.keys())
        if saved[name] != wanted[name]
    ]
    if problems:
        raise UserError(f"{path}: {len(problems)} tensors do not match\n" + "\n".join(problems[:20]))
