"""Exchanges by copy engines give what messages over NCCL give, bit for bit, also while the GPU computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dqt_dist.launch import Launch
from dqt_dist.parallel import peer_copies
from dqt_dist.parallel.collectives import start_gather_sequence, start_scatter_sum_of_pieces
from dqt_dist.parallel.groups import Group, initialize
from tests.gpus import Pools, on_gpus
from tests.small import small_config
from tests.training.conftest import Train

TP_2 = ["parallel.tensor=2", "parallel.sequence=true"]
ROUNDS = 40
"""Each with tensors of another size, so that memory grows and is used again."""


def test_without_gpus_the_run_says_why_ranks_cannot_copy(train: Train) -> None:
    result = train("parallel.peer_copies=true", *TP_2, processes=2)
    assert result.returncode == 2
    assert result.stderr.count("needs tensor-parallel ranks that copy to one another") == 1
    assert "they have no CUDA device" in result.stderr


def exchange(values: Tensor, group: Group, busy: Tensor) -> list[Tensor]:
    """Two gathers at once and a sum, while the GPU multiplies. values: [2 * tokens, features] in bf16."""
    codes = values.to(torch.float8_e4m3fn)
    first = start_gather_sequence([codes, values.float()[:, :1]], group)
    second = start_gather_sequence([values], group)
    count = values.shape[0] // group.size()

    def piece(rank: int, out: Tensor | None) -> Tensor:
        part = values[rank * count : (rank + 1) * count]
        torch.mm(busy, busy)
        return torch.mul(part, group.rank() + 1.5, out=out)

    total = start_scatter_sum_of_pieces(piece, (count, values.shape[1]), values.dtype, values.device, group)
    torch.mm(busy, busy)
    results = [total.wait(), *first.wait(), *second.wait()]
    return [result.view(torch.uint8) if result.dtype == torch.float8_e4m3fn else result for result in results]


def compare(launch: Launch) -> None:
    config = small_config(*TP_2, "parallel.peer_copies=true", "quantization.compute=bf16", "training.cuda_graph=true")
    groups = initialize(config, launch)
    group = groups.tensor
    copies = peer_copies.of(group)
    assert copies is not None

    def by_messages(values: Tensor) -> list[Tensor]:
        peer_copies.use_for(group, None)
        try:
            return exchange(values, group, busy)
        finally:
            peer_copies.use_for(group, copies)

    generator = torch.Generator("cuda").manual_seed(launch.rank)
    busy = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    sizes = torch.randint(1, 2000, (ROUNDS, 2), generator=torch.Generator().manual_seed(1)).tolist()
    for tokens, features in sizes:
        values = torch.randn(2 * tokens, features, device="cuda", generator=generator).bfloat16()
        wanted = by_messages(values)
        found = exchange(values, group, busy)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)
    values = torch.randn(512, 2048, device="cuda", generator=generator).bfloat16()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        found = exchange(values, group, busy)
    for _ in range(ROUNDS):
        values.normal_(generator=generator)
        wanted = by_messages(values)
        graph.replay()
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)
    graph.reset()


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_copies_bring_what_messages_bring(gpu_processes: Pools) -> None:
    on_gpus(gpu_processes, 2, compare)
