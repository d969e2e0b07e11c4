"""Writes a checkpoint folder: whole or not at all, while training waits or goes on.

    check    every float must be finite                                   on the device, in the call
    stage    copy the state of this moment to host memory                 only when asynchronous
    write    tensors, sizes and hashes, manifest, rename, retention       in the call, or in one thread

A save goes to `.partial_step_...`. The folder is renamed only when every rank has written, the manifest is complete and
everything is on the disk. A folder named `step_...` is therefore complete, and a save that is interrupted or that the
disk refuses leaves the older checkpoints as they were. What cannot be deleted afterwards is a warning.

The ranks talk through a gloo group of this writer alone: collectives of its thread must never mix with those of
training.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dqt_dist.checkpoint.collective import on_all_ranks, on_first_rank
from dqt_dist.checkpoint.folder import (
    FORMAT_VERSION,
    MANIFEST,
    METADATA,
    Progress,
    complete_checkpoints,
    manifest_digest,
    sha256_of,
    step_of,
    unused,
)
from dqt_dist.checkpoint.logical_tensor import LogicalSavePlanner, LogicalState, LogicalTensor
from dqt_dist.errors import RankOSError, RunError, UserError, naming

# What torch wants of a view's first byte, and a cache line.
ALIGNMENT = 64


# ---- check ----


def not_finite(state: LogicalState) -> list[str]:
    """Names of the float tensors of this rank that hold a NaN or an infinity. Reads them once; waits for the device."""
    names, largest = [], []
    for name, tensor in state.items():
        for chunk in tensor.chunks.values() if tensor.dtype.is_floating_point else ():
            if chunk.numel():
                names.append(name)
                largest.append(torch.linalg.vector_norm(chunk.detach(), ord=math.inf))  # one pass; a NaN stays a NaN
    if not names:
        return []
    finite = torch.stack([norm.to(largest[0].device) for norm in largest]).isfinite().tolist()
    return sorted({name for name, is_finite in zip(names, finite, strict=True) if not is_finite})


# ---- stage ----


class HostStage:
    """Host memory that the rectangles of a rank are copied into, pinned for a GPU's, used again by each save."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, state: LogicalState) -> LogicalState:
        """The same state in host memory, complete on return. The copy before it is overwritten."""
        views = [chunk for tensor in state.values() for chunk in tensor.chunks.values()]
        on_cuda = any(view.is_cuda for view in views)
        sizes = [-(-view.numel() * view.itemsize // ALIGNMENT) * ALIGNMENT for view in views]
        if self.buffer.numel() < sum(sizes):
            self.buffer = _host_memory(sum(sizes), pinned=on_cuda)
        place = iter(self.buffer[: sum(sizes)].split(sizes))

        def copied(chunk: Tensor) -> Tensor:
            memory = next(place)[: chunk.numel() * chunk.itemsize].view(chunk.dtype).view(chunk.shape)
            return memory.copy_(chunk, non_blocking=True)

        staged = {
            name: LogicalTensor(tensor.shape, tensor.dtype, {at: copied(chunk) for at, chunk in tensor.chunks.items()})
            for name, tensor in state.items()
        }
        if on_cuda:
            torch.cuda.synchronize()
        return staged


def _host_memory(num_bytes: int, pinned: bool) -> Tensor:
    """uint8 [num_bytes]; pinned in place, since torch's own pinned memory comes in powers of two only."""
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    if pinned:
        runtime, address = torch.cuda.cudart(), memory.data_ptr()
        assert runtime is not None
        torch.cuda.check_error(runtime.cudaHostRegister(address, num_bytes, 0))
        # At exit the driver may be gone before; the memory goes with the process.
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return memory


# ---- write ----


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep_last`, and those of every `keep_every`-th step."""

    keep_last: int
    keep_every: int | None = None

    def dropped(self, steps: list[int], saved: int) -> list[int]:
        """Which of `steps` go after the one of step `saved` was written.

        Later steps are of a run that this one went back behind; they count as neither newest nor old.
        """
        older = sorted(step for step in steps if step <= saved)
        return [step for step in older[: -self.keep_last] if not (self.keep_every and step % self.keep_every == 0)]


@dataclass
class SaveFigures:
    """What one save took."""

    step: int
    path: Path
    save_blocked_seconds: float
    """How long training stood still for it: staging, and waiting for the write where it had to."""
    save_seconds: float
    """From the call until the checkpoint was complete."""
    save_bytes: int
    """Size of the checkpoint on disk."""
    warnings: list[str] = field(default_factory=list)
    """What could not be deleted afterwards; on the first rank."""

    def numbers(self) -> dict[str, float]:
        """What metrics.jsonl has of it."""
        return {name: value for name, value in asdict(self).items() if name not in ("path", "warnings")}


class CheckpointWriter:
    """Writes logical states of all ranks below one folder. Every method is a collective call.

    A failure on any rank is raised on all: by `save` itself or, asynchronous, by the next `save`, `wait` or `close`.
    What the disk refused and a state that is not finite are a RunError, a folder that not all nodes share a UserError.
    The checkpoints before it stay as they are.
    """

    def __init__(
        self, directory: Path, retention: Retention, asynchronous: bool, timeout: timedelta | None = None
    ) -> None:
        """`timeout` is that of the writer's group. Default: torch's."""
        self.directory, self.retention = directory, retention
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert group is not None
        self.group = group
        self.stage = HostStage()
        # One thread, which the interpreter joins before it exits.
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None
        self.pending: Future[SaveFigures] | None = None
        self.finished: list[SaveFigures] = []
        self.warnings: list[str] = []
        self.warned: set[Path] = set()

    def save(self, state: LogicalState, progress: Progress, facts: dict[str, Any]) -> None:
        """Writes `state`; `facts` (config, layout, versions) go into the manifest.

        Returns when training may change it.
        """
        self.wait()
        start = time.perf_counter()
        self._check(state, progress)
        if self.thread is None:
            figures = self._write(state, progress, facts, start)
            figures.save_blocked_seconds = figures.save_seconds
            self.finished.append(figures)
            return
        staged = self.stage.copy(state)
        blocked = time.perf_counter() - start
        self.pending = self.thread.submit(self._write, staged, progress, facts, start, blocked)

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises what went wrong in the thread."""
        if self.pending is None:
            return
        start, pending = time.perf_counter(), self.pending
        self.pending = None
        figures = pending.result()
        waited = time.perf_counter() - start
        figures.save_blocked_seconds = min(figures.save_blocked_seconds + waited, figures.save_seconds)
        self.finished.append(figures)

    def take_finished(self) -> list[SaveFigures]:
        """Figures of the saves completed since the last call. Never waits. The only call that is not collective."""
        if self.pending is not None and self.pending.done() and self.pending.exception() is None:
            self.finished.append(self.pending.result())
            self.pending = None
        finished, self.finished = self.finished, []
        return finished

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            if self.thread is not None:
                self.thread.shutdown()

    def _check(self, state: LogicalState, progress: Progress) -> None:
        """Raises RunError on all ranks when a float of any rank is not finite."""
        of_ranks = on_all_ranks(lambda: not_finite(state), self.group)
        ranks = {name: rank for rank, names in reversed(list(enumerate(of_ranks))) for name in names}
        if ranks:
            name = min(ranks)
            more = f", as have {len(ranks) - 1} more tensors" if len(ranks) > 1 else ""
            raise RunError(
                f"step {progress.step}: {name} has values that are not finite on rank {ranks[name]}{more}; no "
                "checkpoint is written of this, the ones before it are as they were"
            )

    def _write(
        self, state: LogicalState, progress: Progress, facts: dict[str, Any], start: float, blocked: float = 0.0
    ) -> SaveFigures:
        try:
            final, files = self._write_folder(state, progress, facts)
        except RankOSError as error:
            raise RunError(
                f"{self.directory}: the checkpoint of step {progress.step} could not be written by rank "
                f"{error.rank}: {error}; the ones before it are as they were"
            ) from error
        size = sum(entry["bytes"] for entry in files.values())
        warnings, self.warnings = self.warnings, []
        return SaveFigures(progress.step, final, blocked, time.perf_counter() - start, size, warnings)

    def _write_folder(
        self, state: LogicalState, progress: Progress, facts: dict[str, Any]
    ) -> tuple[Path, dict[str, dict[str, Any]]]:
        """Returns the finished folder, and size and hash of its files by name."""
        name = f"step_{progress.step:08d}"
        final = self.directory / name
        partial = self.directory / on_first_rank(lambda: self._make_folder(f".partial_{name}"), self.group)
        self._write_tensors(state, partial)
        of_ranks = on_all_ranks(lambda: self._own_files(partial), self.group)
        files = {name: entry for of_rank in of_ranks for name, entry in of_rank.items()}
        manifest = {"format": FORMAT_VERSION, "files": files, **asdict(progress), **facts}
        on_first_rank(lambda: self._complete(partial, final, manifest), self.group)
        return final, files

    def _make_folder(self, name: str) -> str:
        """An empty folder `name`; returns the name it got."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for left_over in self.directory.glob(".partial_step_*"):
            self._delete(left_over)
        partial = unused(self.directory / name)
        partial.mkdir()
        return partial.name

    def _write_tensors(self, state: LogicalState, partial: Path) -> None:
        # Copy-ahead would open a context on GPU 0 in the thread of every rank; a staged state is in host memory anyway.
        files = FileSystemWriter(partial, sync_files=True, per_thread_copy_ahead=0)
        files.fs = _NamedFiles()
        try:
            dcp_save(state, storage_writer=files, planner=LogicalSavePlanner(), process_group=self.group)
        except CheckpointException as failed:
            for rank, (error, _) in failed.failures.items():
                if isinstance(error, OSError):
                    raise RankOSError(rank, error) from failed
            raise

    def _own_files(self, partial: Path) -> dict[str, dict[str, Any]]:
        """Size and hash of the files this rank has written."""
        rank = dist.get_rank(self.group)
        own = [*partial.glob(f"__{rank}_*.distcp"), *([partial / METADATA] if rank == 0 else [])]
        return {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in own}

    def _complete(self, partial: Path, final: Path, manifest: dict[str, Any]) -> None:
        """Manifest, rename, retention; on the first rank."""
        unseen = sorted(manifest["files"].keys() - {path.name for path in partial.iterdir()})
        if unseen:
            raise UserError(
                f"checkpoint.dir: rank 0 does not see {unseen[0]}, which another rank wrote to {partial}; the folder "
                f"must be on a file system that all nodes share"
            )
        _write_manifest(partial, manifest)
        in_the_way = self._hide(final) if os.path.lexists(final) else None
        partial.rename(final)
        _sync_folder(self.directory)
        if in_the_way is not None:
            self._delete(in_the_way)
        steps = [step_of(path) for path in complete_checkpoints(self.directory)]
        for step in self.retention.dropped(steps, saved=manifest["step"]):
            self._drop(self.directory / f"step_{step:08d}")

    def _drop(self, path: Path) -> None:
        """Deletes a checkpoint, or warns."""
        if path.is_symlink():
            self._warn(path, "is a link; it stays, and so does what it points to")
            return
        try:
            hidden = self._hide(path)
        except OSError as error:
            self._warn(path, f"cannot be deleted: {error}")
        else:
            self._delete(hidden)

    def _hide(self, path: Path) -> Path:
        """Another name for a folder that goes: half deleted, it must not look complete."""
        return path.rename(unused(path.with_name(f".partial_{path.name}_dropped")))

    def _delete(self, path: Path) -> None:
        try:
            shutil.rmtree(path)
        except OSError as error:
            self._warn(path, f"cannot be deleted: {error}")

    def _warn(self, path: Path, what: str) -> None:
        """Once for each path, however often it is met."""
        if path not in self.warned:
            self.warned.add(path)
            self.warnings.append(f"warning: {path} {what}; the run goes on")


class _NamedFiles(FileSystem):
    """Files whose errors name them."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with naming(path), super().create_stream(path, mode) as stream:
            yield stream


def _write_manifest(partial: Path, manifest: dict[str, Any]) -> None:
    path = partial / MANIFEST
    with naming(path), open(path, "w") as file:
        json.dump(manifest | {"sha256": manifest_digest(manifest)}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(partial)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
