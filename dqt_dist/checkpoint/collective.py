"""One function on all ranks of a group, with one outcome: results for all, or an error for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from dqt_dist.errors import RunError, UserError

T = TypeVar("T")


class RankOSError(RunError):
    """What the operating system refused one rank, on all ranks."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"rank {rank}: {text}")


def on_all_ranks(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Calls `function` and returns the results of all ranks of the group (default: of the world) in rank order.

    When it raises on one rank, all ranks raise: a UserError as it is, an OSError as RankOSError. A defect of ours keeps
    its traceback on the rank that has it. A collective call.
    """
    result, error = None, None
    try:
        result = function()
    except Exception as raised:
        error = raised
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, (result, type(error), str(error)), group=group)
    for rank, (_, kind, text) in enumerate(of_ranks):
        if issubclass(kind, UserError):
            raise kind(text)
        if issubclass(kind, OSError):
            raise RankOSError(rank, text)
    if error is not None:
        raise error
    for rank, (_, kind, text) in enumerate(of_ranks):
        if kind is not type(None):
            raise RuntimeError(f"rank {rank} failed: {kind.__name__}: {text}")
    return [result for result, _, _ in of_ranks]


def on_first_rank(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Calls `function` on the first rank and returns its result on all; raises as `on_all_ranks`. A collective call."""
    result = on_all_ranks(function if dist.get_rank(group) == 0 else lambda: None, group)[0]
    return result  # type: ignore[return-value]
