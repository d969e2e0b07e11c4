"""Runs a test function on several gloo ranks of this machine.

    def check(rank, world_size, value): ...          # a module-level function, so that it can be pickled
    results = run_distributed(check, 2, 5)           # one result per rank, in rank order

Importing torch, Megatron and DeepSpeed takes seconds. It is done once, in a process that workers are forked from.
Workers are used again: each call makes a new world with its own file store, and destroys the world afterwards. An
exception on any rank is raised in the caller with that rank's traceback. When a rank does not answer in time, or other
ranks wait for a rank that failed, all workers are killed and the next call starts new ones. Arguments and results are
pickled by value, because Connection.send would share the memory of each tensor through a file descriptor, which makes
thousands of descriptors in the parent.
"""

from __future__ import annotations

import atexit
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

TIMEOUT_SECONDS = 120.0
# Time for the other ranks to fail too, after one rank has failed.
GRACE_SECONDS = 5.0

# Workers are replaced after this number of calls. This bounds the memory that libraries keep of destroyed worlds.
CALLS_A_WORKER = 20

_workers: list[tuple[BaseProcess, Connection]] = []
_calls = 0


class RankError(AssertionError):
    """A rank raised an exception. The message holds the traceback."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT_SECONDS
) -> list[Any]:
    """Calls function(rank, world_size, *args) on `world_size` ranks and returns their results in rank order."""
    _start_workers(world_size)
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world_size):
            _workers[rank][1].send_bytes(pickle.dumps((function, rank, world_size, f"{folder}/store", args)))
        return _collect(world_size, timeout)


def _start_workers(count: int) -> None:
    if parent_process() is not None:
        # A worker imports the main module of the caller. Without a guard in that module the worker would start workers
        # too, without end.
        raise RuntimeError('run_distributed in a worker; put the call under `if __name__ == "__main__":`')
    global _calls
    _calls += 1
    if _calls % CALLS_A_WORKER == 0:
        _kill_workers()
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    while len(_workers) < count:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        there.close()
        _workers.append((process, here))


def _collect(world_size: int, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = {_workers[rank][1]: rank for rank in range(world_size)}
    deadline = time.monotonic() + timeout
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                succeeded, value = False, "the process died"
            (results if succeeded else failures)[rank] = value
            if not succeeded:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    stuck = sorted(waiting.values())
    if stuck or any(not process.is_alive() for process, _ in _workers):
        _kill_workers()
    if failures:
        rank = min(failures)
        raise RankError(
            f"rank {rank} of {world_size} failed (failed: {sorted(failures)}, stuck: {stuck})\n{failures[rank]}"
        )
    if stuck:
        raise RankError(f"ranks {stuck} of {world_size} did not answer within {timeout:.0f} s")
    return [results[rank] for rank in range(world_size)]


@atexit.register
def _kill_workers() -> None:
    for process, connection in _workers:
        process.kill()
        process.join()
        connection.close()
    _workers.clear()


def _serve(connection: Connection) -> None:
    """A worker. It joins one world after the other, until the parent ends."""
    import tests.preloaded  # noqa: F401

    while True:
        try:
            function, rank, world_size, store, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            connection.send_bytes(pickle.dumps((True, _in_world(function, rank, world_size, store, args))))
        except BaseException:
            connection.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _in_world(function: Callable[..., Any], rank: int, world_size: int, store: str, args: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        return function(rank, world_size, *args)
    finally:
        _leave_world()


def _leave_world() -> None:
    """Destroys what a test may have built: Megatron's groups, DeepSpeed's view of the world, the world."""
    import gc
    import sys

    import torch.distributed as dist

    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    if "deepspeed.comm.comm" in sys.modules:
        sys.modules["deepspeed.comm.comm"].cdb = None
    if "deepspeed.runtime.zero.parameter_offload" in sys.modules:
        # Stage 3 numbers parameters and (in a default argument) modules over the life of a process, and checks that the
        # numbers are equal on all ranks. Workers have been in different worlds, so the numbers are reset.
        sys.modules["deepspeed.runtime.zero.partition_parameters"].Init.param_id = 0
        offload = sys.modules["deepspeed.runtime.zero.parameter_offload"].DeepSpeedZeRoOffload
        offload._register_deepspeed_module.__defaults__[0][0] = 0
    if dist.is_initialized():
        dist.destroy_process_group()
    # Engines contain reference cycles, and each group that an engine still holds keeps three gloo threads. After some
    # hundred worlds these would be thousands of threads.
    gc.collect()
    # The remaining objects are modules and caches. The next collection need not look at them again.
    gc.freeze()
