"""Process groups: which ranks share a matrix (tensor), a batch (data), the layers (pipeline).

megatron-core makes the groups. Every function of this project takes the group that it needs as an argument, from
`Groups`. Ranks are numbered along the tensor axis first, so that the ranks that exchange most are neighbours on a node:

    rank = tensor_rank + tensor * (data_rank + data * pipeline_rank)
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from typing import Protocol

import torch
import torch.distributed as dist
import torch.utils.deterministic

from dqt_dist.config import Config, uses_cuda_graph
from dqt_dist.errors import RunError, UserError
from dqt_dist.launch import Launch
from dqt_dist.parallel import megatron_device, peer_copies

Group = dist.ProcessGroup


@dataclass(frozen=True)
class Groups:
    """The groups of this rank. `.size()` and `.rank()` of a group give its size and the rank in it."""

    tensor: Group
    data: Group
    pipeline: Group
    model: Group
    """tensor x pipeline: the ranks that hold one copy of the model."""
    world: Group
    device: torch.device
    local_rank: int


def initialize(config: Config, launch: Launch) -> Groups:
    """Joins the process group of `launch` and builds Megatron's groups.

    The process group comes from the env:// rendezvous, unless torch.distributed is already initialised.
    """
    from megatron.core import parallel_state

    megatron_device.prepare()
    if config.training.deterministic:
        _use_deterministic_kernels()
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
        select_stream(config)
        # gloo carries the few CPU tensors (checkpoint plans, messages), NCCL all others.
        backend, device_id = "cpu:gloo,cuda:nccl", device
    else:
        device, backend, device_id = torch.device("cpu"), "gloo", None
    if not dist.is_initialized():
        try:
            dist.init_process_group(backend, timeout=collective_timeout(config), device_id=device_id)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            where = f"{launch.master_address}:{launch.master_port}"
            why = str(error).splitlines()[0]
            raise RunError(
                f"{where}: the ranks cannot meet there: {why}; start again, where another program has the port with "
                "another MASTER_PORT",
                local=True,
            ) from error
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=config.parallel.virtual_pipeline,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=collective_timeout(config) // timedelta(minutes=1),
    )
    assert dist.group.WORLD is not None
    tensor = parallel_state.get_tensor_model_parallel_group()
    _choose_exchanges(config, tensor, device)
    return Groups(
        tensor=tensor,
        data=parallel_state.get_data_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        world=dist.group.WORLD,
        device=device,
        local_rank=launch.local_rank,
    )


def _choose_exchanges(config: Config, tensor: Group, device: torch.device) -> None:
    """Lets the tensor-parallel ranks copy to one another, as parallel.peer_copies says. A collective call.

    Raises UserError when the config requires such copies and these ranks cannot make them.
    """
    wanted, quantization = config.parallel.peer_copies, config.quantization
    possible = config.parallel.sequence and quantization.method == "dqt"
    # "auto" is for what tests and measurements on GPUs have covered.
    covered = quantization.compute == "fp8" and not config.data.document_masking and device.type == "cuda"
    if not possible or wanted is False or (wanted == "auto" and not covered):
        return
    reason = peer_copies.reason_against(tensor, device)
    if reason is None:
        peer_copies.use_for(tensor, peer_copies.PeerCopies(tensor))
    elif wanted is True:
        raise UserError(
            f'parallel.peer_copies: true needs tensor-parallel ranks that copy to one another, but {reason}; use "auto"'
        )


def collective_timeout(config: Config) -> timedelta:
    """How long any collective of any group waits, in whole minutes.

    Longer than the watchdog (training/watchdog.py) by five minutes: torch cannot say which rank is missing.
    """
    training = config.training
    return timedelta(minutes=5 + ceil(max(training.startup_timeout_seconds, training.step_timeout_seconds) / 60))


def select_stream(config: Config) -> None:
    """Selects the CUDA stream of the run: a new stream where the config uses CUDA graphs, else the default stream.

    No graph can be recorded on the default stream. Call this before the model is built, because autograd adds up a
    parameter's gradient on the stream that was current when the parameter's hooks were made.
    """
    torch.cuda.set_stream(torch.cuda.Stream() if uses_cuda_graph(config) else torch.cuda.default_stream())


def _use_deterministic_kernels() -> None:
    # cuBLAS reads this variable at its first product (NVIDIA, cuBLAS documentation, 2.1.4 Results Reproducibility).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # With True, torch would fill every torch.empty, to make a read before the first write deterministic.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


class HoldsCollectives(Protocol):
    """Something that keeps a communicator in use, such as CUDA graphs with NCCL calls in them."""

    def close(self) -> None: ...


CLOSED_FIRST: weakref.WeakSet[HoldsCollectives] = weakref.WeakSet()
"""What `finalize` closes before it leaves the groups. NCCL waits for ever for graphs that hold its calls
(https://github.com/pytorch/pytorch/issues/115388)."""


def finalize() -> None:
    """Leaves Megatron's groups and the world."""
    from megatron.core import parallel_state

    for holder in list(CLOSED_FIRST):
        holder.close()
    peer_copies.forget()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
