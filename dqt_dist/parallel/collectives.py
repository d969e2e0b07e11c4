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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dqt_dist.kernels.mean import sum_of_parts
from dqt_dist.parallel.groups import Group

Kind = Literal["gradients", "codes", "activation_maxima", "activations"]

BYTES_SENT: Counter[str] = Counter()
"""Bytes that this process has sent so far, by Kind."""


def count_sent(kind: Kind, full_tensor: Tensor, group: Group, passes: int = 1) -> None:
    """Counts a collective over `full_tensor`, the tensor before a scatter or after a gather."""
    num_ranks = group.size()
    BYTES_SENT[kind] += passes * full_tensor.numel() * full_tensor.element_size() * (num_ranks - 1) // num_ranks


# torch 2.13 renamed these two functions and warns about the old names. torch 2.11 has only the old names.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


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


@dataclass
class Pending:
    """A result on its way. What the caller launches before `wait` runs beside the exchange."""

    result: Tensor
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """The result, once it has arrived."""
        if self.work is not None:
            self.work.wait()
        return self.result


def start_gather_sequence(x: Tensor, group: Group) -> Pending:
    """Concatenates shards [s / n, ...] along the sequence to [s, ...]. Not differentiable: used inside Functions."""
    if group.size() == 1:
        return Pending(x)
    gathered = torch.empty(x.shape[0] * group.size(), *x.shape[1:], dtype=x.dtype, device=x.device)
    wire = torch.uint8 if x.dtype == torch.float8_e4m3fn else x.dtype  # no backend transports fp8
    work = all_gather_single(gathered.view(wire), x.contiguous().view(wire), group=group, async_op=True)
    count_sent("activations", gathered, group)
    return Pending(gathered, work)


def start_scatter_sum_sequence(x: Tensor, group: Group) -> Pending:
    """Sums [s, ...] over `group` and keeps this rank's part [s / n, ...] of the sequence. Not differentiable."""
    if group.size() == 1:
        return Pending(x)
    part = torch.empty(x.shape[0] // group.size(), *x.shape[1:], dtype=x.dtype, device=x.device)
    work = reduce_scatter_single(part, x.contiguous(), group=group, async_op=True)
    count_sent("activations", x, group)
    return Pending(part, work)


def scatter_sum_of_pieces(piece: Callable[[int, Tensor | None], Tensor], group: Group) -> Tensor:
    """Sum over ranks of piece(this rank). `piece(r)`: what this rank adds to the result of rank r, contiguous; with a
    second argument, into that memory.

    A piece travels while the next is made. The parts are added in rank order, in fp32 (integers exactly), and rounded
    once to the type of the pieces. Sends as many bytes as a reduce-scatter. Not differentiable.
    """
    size, rank = group.size(), group.rank()
    if size == 1:
        return piece(rank, None)
    sent = [piece((rank + 1) % size, None)]
    parts = sent[0].new_empty(size, *sent[0].shape)
    works = []
    for step in range(1, size):
        if step > 1:
            sent.append(piece((rank + step) % size, None))
        to, source = (dist.get_global_rank(group, (rank + s) % size) for s in (step, -step))
        works += dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent[-1], to, group),
                dist.P2POp(dist.irecv, parts[(rank - step) % size], source, group),
            ]
        )
    piece(rank, parts[rank])
    for work in works:
        work.wait()
    count_sent("activations", parts, group)
    return sum_of_parts(parts.view(size, -1)).view(parts.shape[1:])


def start_reduce(x: Tensor, group: Group, kind: Kind, op: Any = dist.ReduceOp.SUM) -> Pending:
    """All-reduce of `x` over `group`, into x itself; no call for one rank. Not differentiable."""
    if group.size() == 1:
        return Pending(x)
    count_sent(kind, x, group, passes=2)
    return Pending(x, dist.all_reduce(x, op=op, group=group, async_op=True))


def reduce_in_place(x: Tensor, group: Group, kind: Kind, op: Any = dist.ReduceOp.SUM) -> None:
    """`start_reduce`, and waits."""
    start_reduce(x, group, kind, op).wait()
