"""The claim of the project: a low-bit weight has no float copy, anywhere, at any time.

The tests look at every tensor alive in the process, by the memory of the tensor.
"""

from __future__ import annotations

import gc

import pytest
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dqt_dist.lowbit.coordinates import normal_quantiles
from tests.distributed import run_distributed
from tests.parallel.runs import Run, start

# Low-bit matrices are larger than all other tensors that live between steps: at least 2 x 96 x 64, against a vocabulary
# of 16 x 64.
WIDE = ("model.hidden_size=64", "model.ffn_hidden_size=96", "model.vocab_size=16", "training.global_batch_size=4")


def float_storages() -> dict[int, int]:
    """Memory of every float tensor alive: address -> elements that it can hold (bytes / element size, largest view)."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.is_floating_point():
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes() // thing.element_size()
    return found


def undeclared(run: Run) -> list[int]:
    """Elements of undeclared float memory that is at least as large as the smallest low-bit matrix.

    Moments and gradients are declared.
    """
    rows = run.optimizer.low_bit.rows
    smallest = min((r.weight.numel for r in rows), default=64 * 64)
    allowed = [t for r in rows for t in r.state.values()] + [
        r.gradient.local for r in rows if r.gradient.local is not None
    ]
    allowed.append(normal_quantiles())  # the table of initial values, 65,536 constants of the package
    addresses = {t.untyped_storage().data_ptr() for t in allowed}
    return [numel for address, numel in float_storages().items() if address not in addresses and numel >= smallest]


def _walk(rank: int, world: int, *overrides: str) -> tuple[list[int], list[tuple[int, int, str]], list[float]]:
    """Undeclared float memory, the codes of each matrix, and bytes of latents per updated weight of each matrix."""
    run = start(*WIDE, *overrides)
    run.step(1)
    run.step(2)
    gc.collect()
    latents = [
        r.state["latent"].untyped_storage().nbytes() / ((r.stop - r.start) * r.weight.columns)
        for r in run.optimizer.low_bit.rows
        if "latent" in r.state
    ]
    codes = [
        (r.weight.codes.untyped_storage().nbytes(), r.weight.numel, str(r.weight.codes.dtype))
        for r in run.optimizer.low_bit.rows
    ]
    return undeclared(run), codes, latents


@pytest.mark.parametrize(("bits", "storage_bits"), [("ternary", 2), (2, 2), (4, 4), (6, 6), (8, 8)])
@pytest.mark.parametrize(
    "overrides", [(), ("parallel.tensor=2",), ("quantization.compute=bf16", "deepspeed.zero_optimization.stage=1")]
)
def test_no_float_copy_of_a_low_bit_matrix_lives(
    bits: str | int, storage_bits: int, overrides: tuple[str, ...]
) -> None:
    """Codes take exactly storage_bits per weight, and no undeclared float memory is as large as a matrix."""
    world = 2 if "parallel.tensor=2" in overrides else 1
    for found, codes, latents in run_distributed(_walk, world, f"quantization.bits={bits}", *overrides):
        assert found == [] and latents == []
        assert len(codes) == 8
        for code_bytes, numel, dtype in codes:
            assert code_bytes * 8 == numel * storage_bits
            assert dtype == ("torch.int8" if storage_bits == 8 else "torch.uint8")


@pytest.mark.parametrize(("latent_bits", "latent_bytes"), [(3, 0.5), (4, 0.5), (5, 1), (6, 0.75), (8, 1)])
@pytest.mark.parametrize("overrides", [(), ("deepspeed.zero_optimization.stage=1",)])
def test_latents_take_their_bytes_and_no_float_copy(
    latent_bits: int, latent_bytes: float, overrides: tuple[str, ...]
) -> None:
    """Ternary codes with latents. In stage 1 a rank holds the latents of the rows that it owns."""
    settings = (f"quantization.latent_bits={latent_bits}", "quantization.scale_refit_interval=1", *overrides)
    for found, codes, latents in run_distributed(_walk, 2, *settings):
        assert found == []
        assert len(latents) == len(codes) == 8 and set(latents) == {latent_bytes}
        assert all(code_bytes * 4 == numel for code_bytes, numel, _ in codes)


def _moment_bytes(rank: int, world: int, *overrides: str) -> list[tuple[int, int, int, int]]:
    """Bytes of all moments of each matrix, with its owned rows, its columns and its number of logical matrices."""
    run = start(*WIDE, *overrides)
    run.step(1)
    assert undeclared(run) == []
    return [
        (
            sum(tensor.untyped_storage().nbytes() for tensor in r.state.values()),
            r.stop - r.start,
            r.weight.columns,
            len(r.weight.scale),
        )
        for r in run.optimizer.low_bit.rows
    ]


@pytest.mark.parametrize("overrides", [(), ("deepspeed.zero_optimization.stage=1",)])
def test_a_factored_second_moment_takes_no_bytes_per_weight(overrides: tuple[str, ...]) -> None:
    """A first moment of 8 bits is 1 byte per weight and 1 per 32 weights. Control: in full both moments are twice that.

    The factors are fp32: one per row, one per column of each matrix, one per matrix.
    """
    for second_moment, moments in (("factored", 1), ("full", 2)):
        settings = (f"optimizer.second_moment={second_moment}", "optimizer.state_bits=8", *overrides)
        for shards in run_distributed(_moment_bytes, 2, *settings):
            assert len(shards) == 8
            for found, rows, columns, matrices in shards:
                factors = 4 * (rows + matrices * (columns + 1)) if second_moment == "factored" else 0
                assert found == moments * rows * columns * 33 // 32 + factors


def test_the_walk_sees_a_float_master() -> None:
    """Negative control: BitNet keeps float masters, and the same walk finds them."""
    ((found, codes, _),) = run_distributed(_walk, 1, "quantization.method=bitnet")
    assert codes == [] and len(found) >= 8


# ---- during a step ----

# With 8 tokens an activation has at most 8 x 192 elements, fewer than any matrix. A float tensor as large as a matrix
# is a weight.
FEW_TOKENS = ("model.seq_length=8", "training.micro_batch_size=1", "training.global_batch_size=1")


def _kept_for_backward(rank: int, world: int, *overrides: str) -> tuple[list[int], list[int], int]:
    """Float memory between forward and backward, and the number of elements of the smallest block linear.

    The float memory is the undeclared memory alive, and the elements of each float tensor that autograd keeps.
    Autograd's list also has tensors that Python does not see.
    """
    run = start(*WIDE, *FEW_TOKENS, *overrides)
    alive: list[int] = []
    kept: list[int] = []
    run.model_chunks[0].output_layer.register_forward_hook(lambda *_: alive.extend(undeclared(run)))

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run.step(1)
    return alive, kept, 64 * 64


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_no_float_copy_is_kept_for_the_backward(compute: str) -> None:
    alive, kept, smallest = run_distributed(_kept_for_backward, 1, f"quantization.compute={compute}")[0]
    assert alive == []
    assert len(kept) > 10 and max(kept) < smallest


def test_a_weight_kept_for_the_backward_is_seen() -> None:
    """Negative control: BitNet's ternarised weights are floats, and autograd keeps them."""
    _, kept, smallest = run_distributed(_kept_for_backward, 1, "quantization.method=bitnet")[0]
    assert sum(elements >= smallest for elements in kept) >= 8
