"""Saving and resuming a run: from model and optimizer to checkpoint folders and back.

state.py says what is saved, writer.py how, folder.py what a folder holds. Loading restores every tensor in place,
whatever process grid wrote it, and refuses a checkpoint of another model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from dqt_dist.checkpoint.folder import (
    Progress,
    check_sizes,
    complete_checkpoints,
    progress_of,
    read_manifest,
    resolve,
    step_of,
)
from dqt_dist.checkpoint.logical_tensor import LogicalLoadPlanner, LogicalState
from dqt_dist.checkpoint.run_tokenizer import check_tokenizer
from dqt_dist.checkpoint.state import logical_state
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


def find(config: Config, resume: str) -> Path | None:
    """The checkpoint `--resume` means: None for `none`, and for `auto` when there is none yet.

    A path may be a checkpoint, a run or its checkpoints folder (then its newest). Raises UserError when it holds none.
    """
    if resume == "none":
        return None
    if resume == "auto":
        found = complete_checkpoints(checkpoints_folder(config))
        return found[-1] if found else None
    return resolve(Path(resume))


def set_aside_newer(config: Config, checkpoint: Path) -> list[Path]:
    """Renames the run folder's checkpoints of later steps than `checkpoint`, because the run will compute these steps
    anew.

    Otherwise --resume auto would take them up again after the next interruption. Nothing is deleted: `step_N` becomes
    `left_step_N`. Returns the new names; on the first rank, before anything is written. A collective call.
    """
    renamed: list[Path] = []
    if dist.get_rank() == 0 and checkpoint.resolve().parent == checkpoints_folder(config).resolve():
        for newer in complete_checkpoints(checkpoints_folder(config)):
            if step_of(newer) > start_of(checkpoint).step:
                target = newer.with_name(f"left_{newer.name}")
                while target.exists():
                    target = target.with_name(f"{target.name}_again")
                renamed.append(newer.rename(target))
    dist.barrier()
    return renamed


def start_of(checkpoint: Path | None) -> Progress:
    """The progress at which a run begins: that of `checkpoint`, or zero without one.

    Raises UserError as `load` does.
    """
    return Progress(0, 0, 0) if checkpoint is None else progress_of(read_manifest(checkpoint))


def check_tokenizer_of(checkpoint: Path | None, tokenizer: Tokenizer) -> None:
    """Raises UserError when `checkpoint` was trained with another tokenizer than that of data.tokenizer."""
    if checkpoint is not None:
        run = checkpoint.parent.parent
        check_tokenizer(tokenizer, read_manifest(checkpoint), checkpoint, run, where="data.tokenizer")


def load(path: Path, model_chunks: nn.Module, optimizer: CombinedOptimizer, config: Config) -> Progress:
    """Restores everything in place, whatever layout wrote it. A collective call.

    Raises UserError for a damaged checkpoint, one of another model, or one with missing or extra tensors.
    """
    manifest = read_manifest(path)
    check_sizes(path, manifest)
    check_identity(manifest, config, path)
    state = logical_state(model_chunks, optimizer)
    reader = FileSystemReader(path)
    _check_names(state, set(reader.read_metadata().state_dict_metadata), path)
    dcp_load(state, storage_reader=reader, planner=LogicalLoadPlanner())
    progress = progress_of(manifest)
    optimizer.state_was_loaded(progress.step)
    return progress


def check_identity(manifest: dict[str, Any], config: Config, path: Path) -> None:
    """Raises UserError naming every field in which the checkpoint's model differs from the config's."""
    saved, current = manifest["config"], config.model_dump(mode="json")
    differing = []
    for section, fields in IDENTITY.items():
        for name in fields or current[section]:
            old, new = saved[section].get(name, BEFORE.get(name)), current[section][name]
            if old != new:
                differing.append(f"{section}.{name}: the checkpoint has {old!r}, the config {new!r}")
    if differing:
        raise UserError(
            f"{path}: made for another model; set these alike or use --resume none\n" + "\n".join(differing)
        )


def _check_names(state: LogicalState, saved: set[str], path: Path) -> None:
    """Every tensor must be restored: nothing is skipped in silence."""
    of_ranks: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(of_ranks, set(state))
    wanted = set().union(*of_ranks)
    problems = [f"{name}: in this run, not in the checkpoint" for name in sorted(wanted - saved)]
    problems += [f"{name}: in the checkpoint, not in this run" for name in sorted(saved - wanted)]
    if problems:
        raise UserError(f"{path}: {len(problems)} tensors do not match\n" + "\n".join(problems[:20]))
