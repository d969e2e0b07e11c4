"""What a step costs: arithmetic, memory, and the bytes that a low-bit weight really takes.

MFU = model FLOP/s (plan/arithmetic.py) over the peak of all devices.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.config import Config
from dqt_dist.optim.low_bit_optimizer import LowBitOptimizer
from dqt_dist.parallel.collectives import BYTES_SENT, Kind
from dqt_dist.parallel.groups import Groups
from dqt_dist.plan.arithmetic import DEVICES

MATMUL_SIZE, MATMUL_SECONDS = 512, 0.3


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s of all devices of the run together, and where the number comes from."""

    flops: float
    source: str


def peak_flops(config: Config, groups: Groups) -> Peak:
    """Peak from the config, else from the datasheet table, else measured. A collective call.

    A device that is not in the table is measured by a matrix product that all ranks run at once.
    """
    world = groups.world.size()
    if config.logging.peak_tflops is not None:
        return Peak(config.logging.peak_tflops * 1e12 * world, "logging.peak_tflops")
    if groups.device.type == "cuda":
        name = torch.cuda.get_device_name(groups.device)
        for device in DEVICES:
            if device.name in name:
                return Peak(device.bf16_tflops * 1e12 * world, f"datasheet, {device.name} bf16")
    measured = torch.tensor(_measure_matmul(groups), dtype=torch.float64)
    dist.all_reduce(measured)
    return Peak(float(measured), f"measured, fp32 product of {MATMUL_SIZE} x {MATMUL_SIZE} on every rank at once")


def _measure_matmul(groups: Groups) -> float:
    """FLOP/s of this rank while all ranks compute. Ranks that share cores share them in this measurement too."""
    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=groups.device)
    torch.mm(a, a)
    dist.barrier()
    products, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < MATMUL_SECONDS:
        torch.mm(a, a)
        products += 1
    if a.is_cuda:
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return products * 2 * MATMUL_SIZE**3 / seconds


def peak_memory_bytes(groups: Groups) -> int:
    """Largest over the ranks: device memory on CUDA, resident memory of the process on a CPU. A collective call."""
    if groups.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(groups.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    largest = torch.tensor(peak, dtype=torch.int64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def sent_bytes(steps: int) -> dict[str, float]:
    """Bytes that all ranks together have sent per step since `reset_sent_bytes`, by kind. A collective call.

    Only the collectives of parallel/collectives.py and parallel/row_sharding.py are counted. Not counted are Megatron's
    messages between pipeline stages, the collectives of Megatron's embedding and loss, and DeepSpeed's gathers of
    high-precision parameters.
    """
    kinds = get_args(Kind)
    totals = torch.tensor([BYTES_SENT[kind] for kind in kinds], dtype=torch.float64)
    dist.all_reduce(totals)
    return {f"{kind}_sent_bytes": float(total) / max(1, steps) for kind, total in zip(kinds, totals, strict=True)}


def reset_sent_bytes() -> None:
    """Starts the count of `sent_bytes` at 0 on this rank."""
    BYTES_SENT.clear()


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the allocations behind `tensors`. Each allocation counts once and in full, however many views it has."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def low_bit_bytes(optimizer: LowBitOptimizer) -> dict[str, float]:
    """Bytes per low-bit weight between steps, by kind, from the tensors alive on all ranks. A collective call.

    The kinds are codes, latents, scales with their row index, moments, and gradient buffers that outlive the step. Each
    kind is summed over all ranks and divided by the number of weights on all ranks. Empty without low-bit weights.
    """
    kinds = ("codes", "latents", "scales", "moments", "gradient")
    tensors: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    num_weights = 0
    for rows in optimizer.rows:
        weight = rows.weight
        num_weights += weight.numel
        tensors["codes"].append(weight.codes)
        tensors["scales"] += [weight.scale, weight.row_matrix]
        if weight.latent_grid is not None:
            tensors["scales"].append(weight.latent_scale)
        for name, tensor in rows.state.items():
            tensors["latents" if name == "latent" else "moments"].append(tensor)
        buffer = rows.gradient
        tensors["gradient"] += [t for t in (buffer.local, buffer.recorded, buffer.mean) if t is not None]
    totals = torch.tensor([num_weights, *(storage_bytes(tensors[kind]) for kind in kinds)], dtype=torch.int64)
    dist.all_reduce(totals)
    if totals[0] == 0:
        return {}
    return {kind: float(totals[i + 1] / totals[0]) for i, kind in enumerate(kinds)}


def count_parameters(model_chunks: nn.Module, optimizer: LowBitOptimizer, groups: Groups) -> tuple[int, int]:
    """Number of weights of the whole model, and of the low-bit weights among them. A collective call.

    A weight that several ranks hold counts once.
    """
    from dqt_dist.layers.parameters import parameters

    low_bit = sum(rows.weight.numel for rows in optimizer.rows)
    other = sum(
        p.layout.rows * p.layout.columns
        for p in parameters(model_chunks)
        if not (p.replicated and groups.tensor.rank() > 0)
    )
    if groups.data.rank() > 0:
        low_bit, other = 0, 0
    totals = torch.tensor([low_bit + other, low_bit], dtype=torch.int64)
    dist.all_reduce(totals)
    return int(totals[0]), int(totals[1])


def versions() -> dict[str, Any]:
    """Versions of the software that a result depends on."""
    import platform
    from importlib.metadata import version

    packages = ("dqt_dist", "torch", "megatron-core", "deepspeed", "numpy")
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except Exception:
            import dqt_dist

            found[package] = dqt_dist.__version__ if package == "dqt_dist" else "unknown"
    return found
