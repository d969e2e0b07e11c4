"""Writes a checkpoint folder: whole or not at all, while training waits or goes on.

    stage    copy the state of this moment to host memory                 only when asynchronous
    write    tensors, sizes and hashes, manifest, rename, retention       in the call, or in one thread

A save goes to `.partial_step_...`. The folder is renamed only when every rank has written, the manifest is complete and
everything is on the disk. A folder named `step_...` is therefore complete, and an interrupted save leaves the older
checkpoints as they were.

The ranks talk through a gloo group of this writer alone: collectives of its thread must never mix with those of
training.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dqt_dist.checkpoint import folder
from dqt_dist.checkpoint.folder import MANIFEST, Progress, complete_checkpoints, sha256_of, step_of
from dqt_dist.checkpoint.logical_tensor import LogicalSavePlanner, LogicalState, LogicalTensor
from dqt_dist.errors import RunError, UserError

T = TypeVar("T")
# What torch wants of a view's first byte, and a cache line.
ALIGNMENT = 64


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


class CheckpointWriter:
    """Writes logical states of all ranks below one folder. Every method is a collective call.

    A failure on any rank is raised on all: by `save` itself or, asynchronous, by the next `save`, `wait` or `close`.
    What the disk refused is a RunError, a folder that not all nodes share a UserError. The checkpoints before it stay
    as they are.
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

    def save(self, state: LogicalState, progress: Progress, facts: dict[str, Any]) -> None:
        """Writes `state`; `facts` (config, layout, versions) go into the manifest.

        Returns when training may change it.
        """
        self.wait()
        start = time.perf_counter()
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

    def _write(
        self, state: LogicalState, progress: Progress, facts: dict[str, Any], start: float, blocked: float = 0.0
    ) -> SaveFigures:
        name = f"step_{progress.step:08d}"
        final, partial = self.directory / name, self.directory / f".partial_{name}"
        self._on_first_rank(lambda: self._make_folder(partial))
        self._write_tensors(state, partial)
        of_ranks = self._on_all_ranks(lambda: self._own_files(partial))
        files = {name: entry for of_rank in of_ranks for name, entry in of_rank.items()}
        self._on_first_rank(lambda: self._complete(partial, final, {"files": files, **asdict(progress), **facts}))
        size = sum(entry["bytes"] for entry in files.values())
        return SaveFigures(progress.step, final, blocked, time.perf_counter() - start, size)

    def _make_folder(self, partial: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for left_over in self.directory.glob(".partial_step_*"):
            shutil.rmtree(left_over)
        partial.mkdir()

    def _write_tensors(self, state: LogicalState, partial: Path) -> None:
        # Copy-ahead would open a context on GPU 0 in the thread of every rank; a staged state is in host memory anyway.
        files = FileSystemWriter(partial, sync_files=True, per_thread_copy_ahead=0)
        try:
            dcp_save(state, storage_writer=files, planner=LogicalSavePlanner(), process_group=self.group)
        except CheckpointException as failed:
            for rank, (error, _) in failed.failures.items():
                if isinstance(error, OSError):
                    raise self._disk_error(rank, error) from failed
            raise

    def _disk_error(self, rank: int, error: object) -> RunError:
        return RunError(
            f"{self.directory}: a checkpoint could not be written by rank {rank}: {error}; "
            "the ones before it are as they were"
        )

    def _own_files(self, partial: Path) -> dict[str, dict[str, Any]]:
        """Size and hash of the files this rank has written."""
        rank = self.group.rank()
        own = [*partial.glob(f"__{rank}_*.distcp"), *([partial / ".metadata"] if rank == 0 else [])]
        return {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in own}

    def _complete(self, partial: Path, final: Path, manifest: dict[str, Any]) -> None:
        """Manifest, rename, retention; on the first rank."""
        unseen = sorted(manifest["files"].keys() - {path.name for path in partial.iterdir()})
        if unseen:
            raise UserError(
                f"checkpoint.dir: rank 0 does not see {unseen[0]}, which another rank wrote to {partial}; the folder "
                f"must be on a file system that all nodes share"
            )
        _write_manifest(partial, {"format": folder.FORMAT_VERSION, **manifest})
        if final.exists():
            self._drop(final)
        partial.rename(final)
        _sync_folder(self.directory)
        steps = [step_of(path) for path in complete_checkpoints(self.directory)]
        for step in self.retention.dropped(steps, saved=manifest["step"]):
            self._drop(self.directory / f"step_{step:08d}")

    def _drop(self, path: Path) -> None:
        """Under another name first: a folder that is half deleted must not look complete."""
        doomed = self.directory / f".partial_{path.name}_dropped"
        path.rename(doomed)
        shutil.rmtree(doomed)

    def _on_first_rank(self, function: Callable[[], None]) -> None:
        self._on_all_ranks(function if self.group.rank() == 0 else lambda: None)

    def _on_all_ranks(self, function: Callable[[], T]) -> list[T]:
        """Calls `function` and returns every rank's result in rank order; raises on all ranks when it does on one.

        An OSError becomes a RunError on all ranks; a defect of ours keeps its traceback on the rank that has it.
        """
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        of_ranks: list[Any] = [None] * self.group.size()
        dist.all_gather_object(of_ranks, (result, type(error), str(error)), group=self.group)
        for rank, (_, kind, text) in enumerate(of_ranks):
            if kind is UserError:
                raise UserError(text)
            if issubclass(kind, OSError):
                raise self._disk_error(rank, text)
        if error is not None:
            raise error
        for rank, (_, kind, text) in enumerate(of_ranks):
            if kind is not type(None):
                raise RuntimeError(f"the checkpoint was not written: rank {rank} failed: {kind.__name__}: {text}")
        return [result for result, _, _ in of_ranks]


def _write_manifest(partial: Path, manifest: dict[str, Any]) -> None:
    with open(partial / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(partial)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
