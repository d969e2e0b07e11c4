"""One function on all ranks of a group, with one outcome: results for all, or an error for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from dqt_dist.errors import RankOSError, UserError

T = TypeVar("T")


def on_all_ranks(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Calls `function` and returns the results of all ranks of the group (default: of the world) in rank order.

    When it raises on one rank, all ranks raise: a UserError as it is, an OSError as RankOSError. A defect of ours keeps
    its traceback on the rank that has it. A collective call.
    """
    result, error, what = None, None, None
    try:
        result = function()
    except OSError as raised:
        error, what = raised, OSError(raised.errno, raised.strerror or str(raised), raised.filename)
    except Exception as raised:
        error, what = raised, str(raised)
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, (result, type(error), what), group=group)
    for rank, (_, kind, what) in enumerate(of_ranks):
        if issubclass(kind, UserError):
            raise kind(what)
        if isinstance(what, OSError):
            raise RankOSError(rank, what)
    if error is not None:
        raise error
    for rank, (_, kind, what) in enumerate(of_ranks):
        if kind is not type(None):
            raise RuntimeError(f"rank {rank} failed: {kind.__name__}: {what}")
    return [result for result, _, _ in of_ranks]


def on_first_rank(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Calls `function` on the first rank and returns its result on all; raises as `on_all_ranks`. A collective call."""
    result = on_all_ranks(function if dist.get_rank(group) == 0 else lambda: None, group)[0]
    return result  # type: ignore[return-value]
