"""Activation checkpointing changes only what is kept in memory: the bits are the same in every layout."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.distributed import run_distributed
from tests.parallel.runs import assert_equal, recorded, start

SEQUENCE = ("parallel.tensor=2", "parallel.sequence=true")
LAYOUTS = [
    (1, ()),
    (1, ("quantization.method=none", "quantization.compute=bf16")),
    (1, ("data.document_masking=true",)),
    (2, SEQUENCE),
    (2, ("parallel.pipeline=2",)),
    (2, ("deepspeed.zero_optimization.stage=3",)),
]


@pytest.mark.parametrize("recompute", ["mlp", "full"])
@pytest.mark.parametrize("world_size, overrides", LAYOUTS)
def test_recomputation_changes_no_bit(world_size: int, overrides: tuple[str, ...], recompute: str) -> None:
    wanted = recorded(world_size, 2, *overrides)
    found = recorded(world_size, 2, *overrides, f"training.recompute={recompute}")
    assert found.losses == wanted.losses and found.grad_norms == wanted.grad_norms
    assert_equal(found.final, wanted.final)


@pytest.mark.parametrize("recompute", ["mlp", "full"])
@pytest.mark.parametrize("world_size, overrides", [(1, ()), (2, ("parallel.pipeline=2", "model.num_layers=4"))])
def test_some_blocks_recompute_and_change_no_bit(world_size: int, overrides: tuple[str, ...], recompute: str) -> None:
    wanted = recorded(world_size, 2, *overrides)
    found = recorded(world_size, 2, *overrides, f"training.recompute={recompute}", "training.recompute_layers=1")
    assert found.losses == wanted.losses and found.grad_norms == wanted.grad_norms
    assert_equal(found.final, wanted.final)


def test_less_is_kept() -> None:
    """In the forward pass "none" keeps more than "mlp", and "mlp" more than "full". One of two blocks lies between."""
    none, mlp, full = (run_distributed(_forward_bytes, 1, recompute)[0] for recompute in ("none", "mlp", "full"))
    assert none > mlp > full
    for recompute, whole in (("mlp", mlp), ("full", full)):
        half = run_distributed(_forward_bytes, 1, recompute, "training.recompute_layers=1")[0]
        assert none > half > whole


def _forward_bytes(rank: int, world_size: int, recompute: str, *overrides: str) -> int:
    """Float bytes that autograd holds when the forward pass has ended."""
    run = start(f"training.recompute={recompute}", "training.global_batch_size=2", *overrides)
    kept: dict[int, Tensor] = {}
    total: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def count(*_: object) -> None:
        total.append(sum(t.untyped_storage().nbytes() for t in kept.values() if t.is_floating_point()))

    run.model_chunks[0].output_layer.register_forward_hook(count)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run.step(1)
    return total[0]
