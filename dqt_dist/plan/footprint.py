"""The memory of a rank at its fullest moment, by kind.

A step has three moments at which memory may be largest. What a rank holds between steps is there at all of them.

    begin   the last backward pass of the step begins: all activations, and gradients of earlier micro-batches
    end     the backward passes end: gradients, one block's activations
    update  gradients, and the temporaries of the update

Scratch is an estimate, from these allocations:

    a backward pass     a low-bit product unpacks its largest matrix, and makes its gradient before the buffer takes it;
                        the gradients of the widest tensor of a block, or of the head
    gradients under way with D > 1: MAX_IN_FLIGHT exchanges and one more, each twice (optim/gradient_reducer.py)
    an update           fp32 gradients of the weights that DeepSpeed updates (`put_gradients` of its adapter), and with
                        D > 1 the gathered codes (ZeRO 1 and 2)

The estimate agrees within 5 % with the peaks that docs/benchmarks/train_step.md measured (tests/plan/test_measured.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from dqt_dist.config import DTYPE_BYTES, Config, ProcessGrid, uses_cuda_graph
from dqt_dist.plan.activations import activation_bytes
from dqt_dist.plan.memory import RankBytes, last_stage, rank_bytes, stage_weights

# Exchanges of gradients at once: two that run and the one that was just begun (MAX_IN_FLIGHT of gradient_reducer.py).
EXCHANGES = 3


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank of pipeline stage `stage` at its fullest moment. The kinds add up to `total`."""

    stage: int
    moment: str
    """begin, end or update."""
    low_bit: RankBytes
    other: RankBytes
    gradients: int
    activations: int
    scratch: int

    def kinds(self) -> dict[str, int]:
        """Bytes on the device by kind."""
        masters, latents, moments = (
            0 if self.low_bit.on_host else getattr(self.low_bit, name) + getattr(self.other, name)
            for name in ("masters", "latents", "moments")
        )
        return {
            "codes": self.low_bit.weights,
            "latents": latents,
            "scales": self.low_bit.scales,
            "other weights": self.other.weights,
            "masters": masters,
            "moments": moments + self.low_bit.means,
            "gradients": self.gradients,
            "activations": self.activations,
            "scratch": self.scratch,
        }

    @property
    def total(self) -> int:
        return sum(self.kinds().values())

    @property
    def on_host(self) -> int:
        """Bytes in the host's memory, for one rank."""
        parts = (self.low_bit, self.other)
        return sum(part.masters + part.latents + part.moments for part in parts if part.on_host)


def largest_footprint(config: Config, grid: ProcessGrid) -> Footprint:
    """The footprint of the pipeline stage that needs most memory: the first, which holds the activations of most
    micro-batches, or the last, which holds the head."""
    stages = {0, last_stage(config)}
    return max((footprint(config, grid, stage) for stage in sorted(stages)), key=lambda found: found.total)


def footprint(config: Config, grid: ProcessGrid, stage: int) -> Footprint:
    """The footprint of a rank of pipeline stage `stage`, with tensor- and data-parallel rank 0."""
    low_bit, other = rank_bytes(config, grid.data, stage)
    activations = activation_bytes(config, grid.data, stage)
    before = low_bit.gradients_before + other.gradients_before
    after = low_bit.gradients_after + other.gradients_after
    backward = _backward_scratch(config, grid, stage)
    begin = activations.kept + max(activations.head, activations.recomputed)
    # The memory of a CUDA graph stays allocated: what its gradients do not fill is free for the next replay only.
    of_graph = max(0, begin + before - after) if uses_cuda_graph(config) else 0
    moments = {
        "begin": (before, begin, backward),
        "end": (max(before, after), max(of_graph, activations.block), backward),
        "update": (after, of_graph, _update_scratch(config, grid, stage, low_bit)),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    return Footprint(stage, moment, low_bit, other, *moments[moment])


def _backward_scratch(config: Config, grid: ProcessGrid, stage: int) -> int:
    quantization, optimizer = config.quantization, config.optimizer
    low_bit, other = stage_weights(config, stage)
    element, gradient = DTYPE_BYTES[quantization.dtype], DTYPE_BYTES[optimizer.gradient_dtype]
    tokens = config.training.micro_batch_size * config.model.seq_length
    operand = 1 if quantization.compute == "fp8" else element
    unpacked = max((matrix.numel * operand for matrix in low_bit), default=0)
    largest = max(matrix.numel for matrix in low_bit + other)
    products = unpacked + largest * max(element, gradient)
    widest = tokens * element * 2 * config.model.ffn_hidden_size // config.parallel.tensor
    under_way = EXCHANGES * 2 * largest * gradient if grid.data > 1 else 0
    return products + widest + under_way


def _update_scratch(config: Config, grid: ProcessGrid, stage: int, low_bit: RankBytes) -> int:
    _, other = stage_weights(config, stage)
    owners = grid.data if config.zero_stage else 1
    flat = 4 * sum(matrix.numel for matrix in other) // owners
    gathered = low_bit.weights if config.zero_stage in (1, 2) and grid.data > 1 else 0
    return flat + gathered
