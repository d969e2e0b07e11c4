"""Samples to micro-batches: which rank reads which sample at which step.

Nothing here has a state. A step takes the next G samples of the dataset, where G is the global batch size and s the
first of these samples. There are D data-parallel ranks. Micro-batch m of rank r is B consecutive samples:

    first sample = s + m*(D*B) + r*B            m = 0 .. G/(D*B) - 1

So the samples of a step do not depend on D. Resuming needs only the number of samples consumed so far, even when G
changes. Ranks that share a data-parallel rank (tensor and pipeline parallel) read the same samples.

With `num_workers` > 0, PyTorch's DataLoader reads in that many processes, each two steps ahead. `pin_memory` puts the
result where an asynchronous copy to the GPU can start. With 0 workers everything happens in the call. No global random
state is read or moved.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dqt_dist.errors import UserError

MicroBatch = dict[str, torch.Tensor]
_FIELDS = ("tokens", "labels", "loss_mask", "document_starts")


class Loader:
    """The micro-batches of one data-parallel rank, step by step.

    dataset: a map-style dataset of dicts with `tokens` and `labels` int64 [S], `loss_mask` float32 [S] and, with
    document masking, `document_starts` int32 [D] (dataset.py). len(loader) is the number of whole steps in it. Raises
    UserError when the global batch is not a multiple of data_parallel_size * micro_batch_size, or the dataset holds
    less than one step.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        samples_at_once = data_parallel_size * micro_batch_size
        if global_batch_size % samples_at_once:
            raise UserError(
                f"training.global_batch_size: {global_batch_size} is not a multiple of data parallel size"
                f" {data_parallel_size} * training.micro_batch_size {micro_batch_size} = {samples_at_once}"
            )
        self._steps = _Steps(dataset, micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size)
        self._global_batch_size = global_batch_size
        self._num_samples = len(dataset)  # type: ignore[arg-type]
        if len(self) == 0:
            raise UserError(
                f"training.global_batch_size: {global_batch_size} is more than the dataset's "
                f"{self._num_samples} samples"
            )
        self._num_workers = num_workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return self._num_samples // self._global_batch_size

    def iterate(self, first_sample: int = 0) -> Generator[list[MicroBatch], None, None]:
        """Yield one list of micro-batches per step, from the step that begins with `first_sample` to the end of the
        data.

        Each micro-batch is {"tokens": int64 [B, S], "labels": int64 [B, S], "loss_mask": float32 [B, S]} on the CPU,
        with document masking also {"document_starts": int32 [B, D]}.
        Whoever leaves the iterator before its end closes it: workers that are left ignore the SIGTERM with which
        multiprocessing would end them at the exit of this process, and it would wait for them for ever.
        """
        processes = None
        if self._num_workers:
            # Not "fork": a rank has threads of gloo, NCCL and OpenMP by now. A child that is forked while a thread
            # holds a lock waits for the lock for ever. The server is a fresh process that does nothing but fork
            # workers, and imports what they need, PyTorch above all, once and not each of them.
            processes = multiprocessing.get_context("forkserver")
            processes.set_forkserver_preload([__name__, type(self._steps.dataset).__module__])
        loader = DataLoader(
            self._steps,
            batch_size=None,  # an item is already a whole step
            sampler=range(first_sample, self._num_samples - self._global_batch_size + 1, self._global_batch_size),
            num_workers=self._num_workers,
            multiprocessing_context=processes,
            prefetch_factor=2 if self._num_workers else None,
            worker_init_fn=partial(_end_with, os.getpid()),
            pin_memory=self._pin_memory,
            # DataLoader draws a seed for its workers, from the global generator unless it is given one.
            generator=torch.Generator(),
        )
        others = multiprocessing.active_children()
        with _stop_signals_held():
            steps = iter(loader)  # starts the workers
        workers = [process for process in multiprocessing.active_children() if process not in others]
        try:
            for step in steps:
                yield [dict(zip(step, parts, strict=True)) for parts in zip(*step.values(), strict=True)]
        finally:
            if isinstance(steps, _MultiProcessingDataLoaderIter):
                # What DataLoader does when `steps` is collected. The traceback of an error that a worker met keeps
                # `steps` alive, so it must not be left to that.
                steps._shutdown_workers()
            for worker in workers:
                worker.kill()  # one that did not answer: it hangs in a read, or its queue is broken
                worker.join()


def _end_with(process: int, _worker: int) -> None:
    """Ends this worker when `process` is gone, for whatever reason. PyTorch's worker looks at its parent, which here is
    the server that forked it; and the server lives as long as a worker does."""
    exited = os.pidfd_open(process)

    def wait() -> None:
        select.select([exited], [], [])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _stop_signals_held() -> Iterator[None]:
    """What is started inside never sees the signals that ask a run to stop; this process sees them afterwards.

    A launcher may send them to every process of a job. A worker that died of one would take the step with it that is
    still to be finished and saved. Masks are inherited, also by the server that forks the workers.
    """
    resource_tracker.ensure_running()  # multiprocessing would start it inside, and unblock signals when it has
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Steps(Dataset):
    """Item s: all micro-batches on this rank of the step whose first sample is s, as a tensor [M, B, S] per field (few
    large tensors cross from a worker process more cheaply than many small ones, each of which would hold an open
    file)."""

    def __init__(
        self,
        dataset: Dataset,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        stride = data_parallel_size * micro_batch_size
        # Offsets of this rank's samples in a step, micro-batch after micro-batch.
        self.offsets = [
            first + data_parallel_rank * micro_batch_size + i
            for first in range(0, global_batch_size, stride)
            for i in range(micro_batch_size)
        ]

    def __getitem__(self, first_sample: int) -> MicroBatch:
        samples = [self.dataset[first_sample + offset] for offset in self.offsets]
        return {
            field: torch.stack([sample[field] for sample in samples]).unflatten(0, (-1, self.micro_batch_size))
            for field in _FIELDS
            if field in samples[0]
        }
