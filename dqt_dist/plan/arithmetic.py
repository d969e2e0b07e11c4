"""FLOPs of a model, and what a device can do.

Model FLOPs follow the PaLM paper (arXiv 2204.02311, appendix B), with causal attention counted once:

    matrix products       6 FLOPs per weight and token, forward and backward together
    scores and values     6 * layers * hidden * sequence FLOPs per token; with document masking not counted: how far a
                          token sees then depends on the documents, and what is counted is never more than what is done
    recomputation         not counted
    embedding look-up     not counted
"""

from __future__ import annotations

from dataclasses import dataclass

from dqt_dist.config import Config, ModelConfig
from dqt_dist.errors import UserError


def flops_per_token(model: ModelConfig, document_masking: bool = False) -> int:
    """Model FLOPs of one training token, forward and backward."""
    products = model.num_layers * model.linear_weights_per_block + model.vocab_size * model.hidden_size
    attention = 0 if document_masking else model.num_layers * model.hidden_size * model.seq_length
    return 6 * (products + attention)


@dataclass(frozen=True)
class Device:
    """One GPU, from its vendor's datasheet."""

    name: str
    """Part of the name that its driver gives."""
    bf16_tflops: float
    """Dense bf16 peak, without sparsity."""
    memory_gib: int
    has_fp8: bool
    """Compute capability 8.9 or newer."""


# NVIDIA's datasheets, SXM parts where there are several. What a datasheet calls GB of memory is GiB.
DEVICES = (
    Device("H200", 989.0, 141, True),
    Device("H100", 989.0, 80, True),
    Device("A100", 312.0, 80, False),
    Device("L40S", 362.0, 48, True),
    Device("B200", 2250.0, 180, True),
)

# What CUDA's context, NCCL's buffers, the libraries' workspaces and a fragmented allocator take, and error correction.
# torch sees 79.2 GiB of an H100.
RESERVED_GIB = 3

MACHINE_GPUS = 8
"""GPUs of one machine, between which data goes over NVLink."""
NETWORK_BYTES_PER_SECOND = 50e9
"""What a GPU sends to other machines at most: a port of 400 Gb/s for each, as in NVIDIA's DGX H100 by its datasheet."""


def device_named(name: str) -> Device:
    """The device of --gpu, in any case. Raises `UserError` for one that is not in the table."""
    for device in DEVICES:
        if device.name.lower() == name.lower():
            return device
    known = ", ".join(device.name.lower() for device in DEVICES)
    raise UserError(f"command line: --gpu {name!r} is not known; use one of {known}")


def check_device(config: Config, device: Device) -> None:
    """Raise `UserError` when the device lacks the units that the config computes with."""
    if config.quantization.compute == "fp8" and not device.has_fp8:
        raise UserError(
            f'quantization.compute: "fp8" needs fp8 units (compute capability 8.9 or newer), which an {device.name} '
            f'does not have; use "bf16"'
        )
