"""Runs a test function on GPUs of this machine, one process per rank, over NCCL. See the fixture `gpu_processes`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from dqt_dist.launch import Launch
from dqt_dist.parallel.groups import finalize

Pools = list[ProcessPoolExecutor]
"""A process per rank, which keeps its GPU from test to test."""


def on_gpus(pools: Pools, world_size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(launch, *arguments) on as many GPUs; the result of rank 0. The function joins the process group."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    runs = [pools[rank].submit(_call, rank, world_size, port, function, arguments) for rank in range(world_size)]
    for run in as_completed(runs, timeout=120):
        run.result()  # an error of any rank, at once
    return runs[0].result()


def _call(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    try:
        return function(Launch(rank, world_size, rank, world_size, "tests", "localhost", port), *arguments)
    finally:
        finalize()
