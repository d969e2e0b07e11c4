"""Exchanges between the GPUs of one host by their copy engines, in place of NCCL (parallel.peer_copies).

NCCL's kernels take multiprocessors away from the products that run beside them. A copy from or to the memory of another
GPU takes none. Each rank of a group has memory that the other ranks map (torch's symmetric memory), and a stream of its
own for exchanges. Barriers on this stream tell the ranks when memory is written and when it is free:

    gather   own shard to the staging memory, barrier, copy of everyone's shards to the result, barrier
    pieces   barrier, copy of each piece to the memory of the rank that sums it, barrier; that rank sums afterwards

The second barrier of a gather says that staging memory may be written again. The first barrier of an exchange of pieces
says that every rank has read the pieces of the exchange before. Nothing else orders the ranks, so all ranks of a group
start the same exchanges in the same order. Copies and barriers can be recorded in CUDA graphs.

No multicast is used. PyTorch's private operators `_low_contention_all_gather` and `_low_contention_reduce_scatter` work
in the same way (https://github.com/pytorch/pytorch/pull/130583), for one tensor and without pieces.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup

ALIGNMENT = 256
"""Bytes. A tensor begins at a multiple in staging memory, as torch's allocator aligns blocks to 512."""


@dataclass
class PeerWork:
    """An exchange under way."""

    arrived: torch.cuda.Event
    sent: Any
    """Memory that the exchange reads or writes; it must stay allocated until the exchange has ended."""

    def wait(self) -> None:
        """What the current stream runs from now on runs after the exchange."""
        torch.cuda.current_stream().wait_event(self.arrived)
        self.sent = None


class PeerMemory:
    """Memory of this rank that the other ranks of the group read and write. It grows on demand, a collective call."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.grown: list[Tensor] = []
        """The memory, last, and the smaller memory before. Recorded CUDA graphs go on using the smaller one."""
        self.handle: Any = None

    def at_least(self, num_bytes: int) -> Any:
        """The handle of at least so much memory.

        Raises RuntimeError when memory has to grow during the recording of a CUDA graph.
        """
        from torch.distributed import _symmetric_memory as symmetric_memory

        if self.handle is None or self.grown[-1].numel() < num_bytes:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{num_bytes:,} bytes of peer memory are needed first while a CUDA graph is recorded"
                )
            device = torch.device("cuda", torch.cuda.current_device())
            memory = symmetric_memory.empty((num_bytes,), dtype=torch.uint8, device=device)
            # torch 2.11 clears the memory's signals on the default stream. Without this wait, that could happen after
            # another rank's first barrier has set one.
            torch.cuda.synchronize()
            self.handle = symmetric_memory.rendezvous(memory, self.group)
            self.grown.append(memory)
            torch.cuda.synchronize()  # the handle's tables are uploaded on the current stream
        return self.handle


class PeerCopies:
    """The exchanges of a group of ranks on one host."""

    def __init__(self, group: Group) -> None:
        self.size, self.rank = group.size(), group.rank()
        # Barriers and copies are small pieces of work that others wait for.
        self.stream = torch.cuda.Stream(priority=-1)
        self.staging, self.pieces = PeerMemory(group), PeerMemory(group)

    def start_gather(self, shards: Sequence[Tensor], gathered: Sequence[Tensor]) -> PeerWork:
        """Copies shard i [n, ...] of every rank to gathered[i] [ranks * n, ...], in rank order; all contiguous."""
        raw = [shard.reshape(-1).view(torch.uint8) for shard in shards]
        starts = [0]
        for shard in raw:
            starts.append(starts[-1] + -(-shard.numel() // ALIGNMENT) * ALIGNMENT)
        handle = self.staging.at_least(starts[-1])
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            staged = [
                [
                    handle.get_buffer(rank, shard.shape, torch.uint8, start)
                    for shard, start in zip(raw, starts, strict=False)
                ]
                for rank in range(self.size)
            ]
            for own, shard in zip(staged[self.rank], raw, strict=True):
                own.copy_(shard)
            handle.barrier()
            for step in range(1, self.size + 1):  # each rank begins with its neighbour, so that no two read from one
                source = (self.rank + step) % self.size
                for result, shard in zip(gathered, staged[source], strict=True):
                    result.view(-1).view(torch.uint8).view(self.size, -1)[source].copy_(shard)
            handle.barrier()
            return PeerWork(self.stream.record_event(), (shards, gathered))

    def start_pieces(self, shape: Sequence[int], dtype: torch.dtype) -> PeerPieces:
        """An exchange of pieces of this shape. The pieces of the exchange before must have been summed, or be about to
        be on the current stream."""
        return PeerPieces(self, shape, dtype)


class PeerPieces:
    """An exchange in which each rank sends a piece to each other rank."""

    def __init__(self, copies: PeerCopies, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.copies, self.shape, self.dtype = copies, tuple(shape), dtype
        self.numel = torch.Size(shape).numel()
        self.handle = copies.pieces.at_least(copies.size * self.numel * dtype.itemsize)
        self.parts = self.handle.get_buffer(copies.rank, (copies.size, *self.shape), dtype)
        """[ranks, *shape], what the ranks have sent. This rank writes its own part."""
        self.sent: list[Tensor] = []
        copies.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copies.stream):
            self.handle.barrier()

    def send(self, piece: Tensor, step: int) -> None:
        """Sends `piece` to the rank `step` ranks after this one."""
        copies = self.copies
        to = (copies.rank + step) % copies.size
        copies.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copies.stream):
            self.handle.get_buffer(to, self.shape, self.dtype, copies.rank * self.numel).copy_(piece)
        self.sent.append(piece)

    def finish(self) -> PeerWork:
        """After all sends. Once the result has been waited for, `parts` hold what all ranks have sent."""
        with torch.cuda.stream(self.copies.stream):
            self.handle.barrier()
            return PeerWork(self.copies.stream.record_event(), self.sent)


_COPIES: dict[str, PeerCopies] = {}
"""By the name of the group."""


def use_for(group: Group, copies: PeerCopies | None) -> None:
    """From now on the activations of `group` travel as `copies`; with None, as messages of the backend."""
    if copies is None:
        _COPIES.pop(group.group_name, None)
    else:
        _COPIES[group.group_name] = copies


def of(group: Group) -> PeerCopies | None:
    """The exchanges of `group`; None where the backend's collectives are used."""
    return _COPIES.get(group.group_name)


def forget() -> None:
    """Frees the memory of all groups."""
    _COPIES.clear()


def reason_against(group: Group, device: torch.device) -> str | None:
    """Why the ranks of `group` cannot copy to one another; None if they can. A collective call with one answer."""
    mine = (socket.gethostname(), torch.cuda.current_device() if device.type == "cuda" else None)
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    hosts = sorted({host for host, _ in everyone})
    if device.type != "cuda":
        return "they have no CUDA device"
    if len(hosts) > 1:
        return f"they are on {len(hosts)} hosts: {', '.join(hosts)}"
    devices = [index for _, index in everyone]
    apart = [(a, b) for a in devices for b in devices if a != b and not torch.cuda.can_device_access_peer(a, b)]
    return f"GPU {apart[0][0]} has no access to the memory of GPU {apart[0][1]}" if apart else None
