"""Lets megatron-core's schedules run where there is no CUDA, and be recorded as CUDA graphs where there is.

Megatron's pipeline code names the device "cuda" literally, asks torch.cuda for the current device and synchronises the
device. On a machine without CUDA this module replaces each of these calls by a CPU counterpart.

On every machine Megatron forks a random-number generator around a dropout that LLaMA does not have, and activation
checkpointing saves and restores all generators on the host, which no graph may do. The layers of this project draw no
numbers, so this module replaces both by nothing.
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
    """Replaces the calls. Called once per process, before megatron-core is used."""
    from megatron.core.tensor_parallel import random

    tracker = random.get_cuda_rng_tracker()
    assert tracker is not None
    tracker.fork = lambda name=None: contextlib.nullcontext()  # pyright: ignore[reportAttributeAccessIssue]
    random._get_all_rng_states = lambda: (None, None, None)
    random._set_all_rng_states = lambda *_: None
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
