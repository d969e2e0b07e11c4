"""Process groups: who shares a matrix (tensor), a batch (data), the layers (pipeline).

megatron-core makes the groups. Every function of this project takes the group it needs as an argument, from the one object below. Ranks
are laid out tensor-parallel first, so that the ranks that exchange most are neighbours on a node:

    rank = tensor_rank + tensor * (data_rank + data * pipeline_rank)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.utils.deterministic

from dqt_dist.config import Config, uses_cuda_graph
from dqt_dist.launch import Launch
from dqt_dist.parallel import megatron_cpu

Group = dist.ProcessGroup


@dataclass(frozen=True)
class Groups:
    """The groups of this rank. Sizes and ranks come from the groups themselves (`.size()`, `.rank()`)."""

    tensor: Group
    data: Group
    pipeline: Group
    model: Group
    """tensor x pipeline: the ranks that together hold one copy of the model."""
    world: Group
    device: torch.device
    local_rank: int

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank() == self.pipeline.size() - 1


def initialize(config: Config, launch: Launch) -> Groups:
    """Joins the world of `launch` (env:// rendezvous or an already initialised one) and builds Megatron's groups."""
    from megatron.core import parallel_state, tensor_parallel

    megatron_cpu.prepare()
    if config.training.deterministic:
        _use_deterministic_kernels()
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
        select_stream(config)
        # gloo beside NCCL carries the few CPU tensors (checkpoint plans, messages).
        backend, device_id = "cpu:gloo,cuda:nccl", device
    else:
        device, backend, device_id = torch.device("cpu"), "gloo", None
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(minutes=30), device_id=device_id)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=config.parallel.virtual_pipeline,
        create_gloo_process_groups=False,
    )
    if torch.cuda.is_available():
        # Only forked under sequence parallelism, around a dropout of zero; our draws never use it.
        tensor_parallel.model_parallel_cuda_manual_seed(config.training.seed)
    assert dist.group.WORLD is not None
    return Groups(
        tensor=parallel_state.get_tensor_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        world=dist.group.WORLD,
        device=device,
        local_rank=launch.local_rank,
    )


def select_stream(config: Config) -> None:
    """Selects the CUDA stream that everything after it runs on. Where the config wants CUDA graphs, that is a stream of its own, because
    no graph can be recorded on the default stream. Called before the model is built: autograd adds up a parameter's gradient on the
    stream that was current when the parameter's hooks were made."""
    torch.cuda.set_stream(torch.cuda.Stream() if uses_cuda_graph(config) else torch.cuda.default_stream())


def _use_deterministic_kernels() -> None:
    # cuBLAS reads it when its first product is made (NVIDIA, cuBLAS documentation, 2.1.4 Results Reproducibility).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Otherwise every torch.empty would be filled, in case somebody reads it before writing.
    torch.utils.deterministic.fill_uninitialized_memory = False


def finalize() -> None:
    """Leaves Megatron's groups and the world."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
