"""Lets megatron-core's schedules run where there is no CUDA.

Megatron's pipeline code names the device "cuda" literally, asks torch.cuda for the current device, synchronises the
device, and under sequence parallelism forks a CUDA random-number tracker (for a dropout that LLaMA does not have). On a
machine without CUDA this module replaces each of these calls by a CPU counterpart. On a machine with CUDA this module
does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites device="cuda" arguments of torch functions to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs and str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def cuda_or_cpu() -> Iterator[None]:
    """The context in which every Megatron schedule and constructor is called."""
    if torch.cuda.is_available():
        yield
    else:
        with _CudaMeansCpu():
            yield


def prepare() -> None:
    """Replaces the CUDA calls. Called once per process, before megatron-core is used."""
    if torch.cuda.is_available():
        return
    from megatron.core.tensor_parallel import random
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    # Activation checkpointing saves and restores the state of the device's generator. This project draws nothing from
    # the generator.
    random._get_cuda_rng_state = lambda *_, **__: torch.empty(0, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *_, **__: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    tracker = get_cuda_rng_tracker()
    assert tracker is not None
    tracker.fork = lambda name=None: contextlib.nullcontext()  # pyright: ignore[reportAttributeAccessIssue]
