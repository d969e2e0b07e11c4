"""The collectives of this project. Each collective counts the bytes that this rank sends.

Two collectives are autograd pairs, where the backward is the conjugate of the forward. The others are called inside the
forward and the backward of the low-bit linears, on 8-bit codes and on sums that are not scaled yet. Megatron-core's own
pairs (`tensor_parallel/mappings.py`) take activations in floating point and count nothing.

A collective adds the bytes to BYTES_SENT under the kind of its contents. The number of bytes is computed from sizes for
the usual ring algorithms, whatever algorithm the backend uses. For n ranks and a full tensor of B bytes:

    all-gather, reduce-scatter, all-to-all   B * (n - 1) / n         all-reduce   2 * B * (n - 1) / n
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dqt_dist.kernels.mean import sum_of_parts
from dqt_dist.parallel import peer_copies
from dqt_dist.parallel.groups import Group

Kind = Literal["gradients", "codes", "activation_maxima", "activations"]

BYTES_SENT: Counter[str] = Counter()
"""Bytes that this process has sent so far, by Kind."""


def count_sent(kind: Kind, full_tensor: Tensor, group: Group, passes: int = 1) -> None:
    """Counts a collective over `full_tensor`, the tensor before a scatter or after a gather."""
    num_ranks = group.size()
    BYTES_SENT[kind] += passes * full_tensor.numel() * full_tensor.element_size() * (num_ranks - 1) // num_ranks


# torch 2.13 renamed this function and warns about the old name. torch 2.11 has only the old name.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class _SumPartials(torch.autograd.Function):
    """Each rank holds a partial sum and each rank uses the total: all-reduce forward, all-reduce backward."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        x = x.clone()
        reduce_in_place(x, group, "activations")
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        reduce_in_place(grad, ctx.group, "activations")
        return grad, None


class _SumGradient(torch.autograd.Function):
    """A replicated parameter used on different tokens by each rank: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx, parameter: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        reduce_in_place(grad, ctx.group, "gradients")
        return grad, None


def sum_partials(x: Tensor, group: Group) -> Tensor:
    """Total of partial sums over `group`, differentiable."""
    return x if group.size() == 1 else _SumPartials.apply(x, group)


def sum_gradient(parameter: Tensor, group: Group) -> Tensor:
    """`parameter` itself. The gradient is summed over `group`."""
    return parameter if group.size() == 1 else _SumGradient.apply(parameter, group)


Result = TypeVar("Result")


class Work(Protocol):
    """An exchange under way."""

    def wait(self) -> Any: ...


@dataclass
class Pending(Generic[Result]):
    """A result on its way. What the caller launches before `wait` runs beside the exchange."""

    result: Result
    works: Sequence[Work] = ()
    finish: Callable[[Result], Result] | None = None
    """What is left to compute when everything has arrived."""

    def wait(self) -> Result:
        """The result, once it has arrived."""
        for work in self.works:
            work.wait()
        return self.result if self.finish is None else self.finish(self.result)


def start_gather_sequence(shards: Sequence[Tensor], group: Group) -> Pending[list[Tensor]]:
    """Concatenates shards [s / n, ...] along the sequence to [s, ...], for several tensors at once.

    Not differentiable: used inside Functions.
    """
    if group.size() == 1:
        return Pending(list(shards))
    shards = [shard.contiguous() for shard in shards]
    gathered = [shard.new_empty(shard.shape[0] * group.size(), *shard.shape[1:]) for shard in shards]
    for full in gathered:
        count_sent("activations", full, group)
    copies = peer_copies.of(group)
    if copies is not None:
        return Pending(gathered, [copies.start_gather(shards, gathered)])
    works = []
    for shard, full in zip(shards, gathered, strict=True):
        wire = torch.uint8 if shard.dtype == torch.float8_e4m3fn else shard.dtype  # no backend transports fp8
        works.append(all_gather_single(full.view(wire), shard.view(wire), group=group, async_op=True))
    return Pending(gathered, works)


class _Messages:
    """An exchange in which each rank sends a piece to each other rank, as messages of the backend."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, group: Group) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.parts = torch.empty(self.size, *shape, dtype=dtype, device=device)
        self.sent: list[Tensor] = []
        """Must stay allocated until the messages have left."""
        self.works: list[Work] = []

    def send(self, piece: Tensor, step: int) -> None:
        to, source = (dist.get_global_rank(self.group, (self.rank + s) % self.size) for s in (step, -step))
        self.sent.append(piece)
        self.works += dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, piece, to, self.group),
                dist.P2POp(dist.irecv, self.parts[(self.rank - step) % self.size], source, self.group),
            ]
        )

    def finish(self) -> Work:
        return self

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.sent.clear()


def start_scatter_sum_of_pieces(
    piece: Callable[[int, Tensor | None], Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
) -> Pending[Tensor]:
    """Sum over ranks of piece(this rank), of this shape, type and device.

    `piece(r)`: what this rank adds to the result of rank r, contiguous; with a second argument, into that memory. A
    piece travels while the next is made. The parts are added in rank order, in fp32 (integers exactly), and rounded
    once to the type of the pieces, however they travel. Sends as many bytes as a reduce-scatter. Not differentiable.
    `wait` before the next call for this group.
    """
    size, rank = group.size(), group.rank()
    if size == 1:
        return Pending(piece(rank, None))
    copies = peer_copies.of(group)
    exchange = _Messages(shape, dtype, device, group) if copies is None else copies.start_pieces(shape, dtype)
    for step in range(1, size):
        exchange.send(piece((rank + step) % size, None), step)
    piece(rank, exchange.parts[rank])
    count_sent("activations", exchange.parts, group)
    return Pending(
        exchange.parts, [exchange.finish()], lambda parts: sum_of_parts(parts.view(size, -1)).view(parts.shape[1:])
    )


def start_reduce(x: Tensor, group: Group, kind: Kind, op: Any = dist.ReduceOp.SUM) -> Pending[Tensor]:
    """All-reduce of `x` over `group`, into x itself; no call for one rank. Not differentiable."""
    if group.size() == 1:
        return Pending(x)
    count_sent(kind, x, group, passes=2)
    return Pending(x, [dist.all_reduce(x, op=op, group=group, async_op=True)])


def reduce_in_place(x: Tensor, group: Group, kind: Kind, op: Any = dist.ReduceOp.SUM) -> None:
    """`start_reduce`, and waits."""
    start_reduce(x, group, kind, op).wait()
