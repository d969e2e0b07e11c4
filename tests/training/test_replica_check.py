"""One flipped bit on one rank is found and its tensor is named. Equal tensors are not named."""

from __future__ import annotations

import pytest
import torch

from dqt_dist.errors import RunError
from dqt_dist.layers.parameters import low_bit_matrices
from dqt_dist.training.replica_check import check_replicas, fingerprint
from tests.distributed import run_distributed
from tests.parallel.runs import Run, start

TP = "parallel.tensor=2"
LATENTS = "quantization.latent_bits=6"


def zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


# ---- the fingerprint ----


@pytest.mark.parametrize("num_bytes", [1, 7, 8, 9, 64, 1001])
def test_every_single_bit_shows(num_bytes: int) -> None:
    generator = torch.Generator().manual_seed(num_bytes)
    content = torch.randint(256, (num_bytes,), generator=generator, dtype=torch.uint8)
    prints = {int(fingerprint(content))}
    for byte in range(num_bytes):
        for bit in range(8):
            content[byte] ^= 1 << bit
            prints.add(int(fingerprint(content)))
            content[byte] ^= 1 << bit
    assert len(prints) == 1 + 8 * num_bytes


def test_places_count_and_types_do_not() -> None:
    words = torch.arange(6, dtype=torch.int64)
    assert fingerprint(words) != fingerprint(words.flip(0))
    assert fingerprint(words) == fingerprint(words.view(torch.uint8)) == fingerprint(words.view(2, 3))


def test_large_tensors_are_read_in_parts_to_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.arange(999, dtype=torch.int32).view(torch.uint8)[:3989]
    whole = fingerprint(content)
    monkeypatch.setattr("dqt_dist.training.replica_check.WORDS_AT_ONCE", 7)
    assert fingerprint(content) == whole


# ---- the check ----


def plant(run: Run, what: str) -> None:
    """Flips the last bit of one byte."""
    if what == "codes":
        target = low_bit_matrices(run.model_chunks)[4].codes
    elif what == "latents":
        target = run.optimizer.low_bit.rows[4].state["latent"]
    elif what == "scale":
        target = low_bit_matrices(run.model_chunks)[2].scale
    elif what == "parameter":
        (target,) = [s.parameter.tensor.data for s in run.optimizer.shards if name_of(s) == "lm_head"]
    else:
        (target,) = [s.view(s.master) for s in run.optimizer.shards if name_of(s) == "norm" and s.master is not None]
    target.view(-1).view(torch.uint8)[13 % (target.numel() * target.element_size())] ^= 1


def name_of(shard) -> str:
    return shard.parameter.layout.matrices[0].name


def message(rank: int, world_size: int, what: str, bad_rank: int, *overrides: str) -> str:
    run = start(*overrides)
    run.step(1)
    check_replicas(run.model_chunks, run.optimizer, run.groups, 1)  # no difference, no error
    if rank == bad_rank:
        plant(run, what)
    with pytest.raises(RunError) as caught:
        check_replicas(run.model_chunks, run.optimizer, run.groups, 2)
    return str(caught.value)


O_PROJ = "codes of layers.1.self_attn.o_proj"
NORM = "master of norm"
CASES = [
    (3, "codes", 1, (zero(0),), f"{O_PROJ}: rank(s) 1 differ from 0, 2"),
    (3, "codes", 2, (zero(1),), f"{O_PROJ}: rank(s) 2 differ from 0, 1"),
    (3, "codes", 0, (zero(2),), f"{O_PROJ}: rank(s) 0 differ from 1, 2"),
    (2, "codes", 1, (zero(1),), f"{O_PROJ}: rank(s) 1 differ from 0"),
    (4, "codes", 3, (TP, zero(1)), f"{O_PROJ}: rank(s) 3 differ from 1"),
    (3, "latents", 1, (zero(0), LATENTS), "latents of layers.1.self_attn.o_proj: rank(s) 1 differ from 0, 2"),
    (3, "scale", 1, (zero(3),), "scales of layers.0.mlp.gate_proj layers.0.mlp.up_proj: rank(s) 1 differ from 0, 2"),
    (2, "scale", 1, (TP,), "scales of layers.0.mlp.gate_proj layers.0.mlp.up_proj: rank(s) 1 differ from 0"),
    (3, "parameter", 2, (zero(2),), "parameter lm_head: rank(s) 2 differ from 0, 1"),
    (2, "master", 1, (TP, zero(1), "quantization.compute=bf16"), f"{NORM}: rank(s) 1 differ from 0"),
    (4, "master", 3, (TP, zero(3)), f"{NORM}: rank(s) 3 differ from 2"),
]


@pytest.mark.parametrize(("ranks", "what", "bad_rank", "overrides", "words"), CASES)
def test_one_flipped_bit_is_named_by_rank_and_matrix(
    ranks: int, what: str, bad_rank: int, overrides: tuple[str, ...], words: str
) -> None:
    messages = run_distributed(message, ranks, what, bad_rank, *overrides)
    assert len(set(messages)) == 1  # every rank raises the same message
    first, *lines = messages[0].splitlines()
    assert "replicas differ after step 2" in first
    assert words in lines and len(lines) <= 2  # a scale may be shared both ways
