"""The result of a run does not depend on its division over ranks: whole runs, bit for bit, over layouts and stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dqt_dist.checkpoint.digest import digest as checkpoint_digest
from dqt_dist.checkpoint.folder import Progress
from dqt_dist.checkpoint.state import logical_state
from dqt_dist.layers.build import build_model
from dqt_dist.layers.parameters import low_bit_matrices
from dqt_dist.optim.engine import build_engine
from dqt_dist.optim.schedule import StepRates
from dqt_dist.parallel.collectives import BYTES_SENT
from tests.distributed import run_distributed
from tests.parallel.runs import Run, Whole, assemble, start, whole_state

TP, PP, SP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"
BF16 = "quantization.compute=bf16"
FACTORED = ("optimizer.second_moment=factored", "optimizer.state_bits=8", "model.ffn_hidden_size=64")
LATENTS = ("quantization.latent_bits=4", "quantization.scale_refit_interval=2")


def zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


def digest(whole: Whole) -> str:
    """The digest of a checkpoint that holds these tensors."""
    return checkpoint_digest(whole.items(), Progress(0, 0, 0)).total


# ---- initial state ----

# 4 query groups, so that TP 4 divides them; two layers, so that PP 2 does.
WIDE = ("model.num_query_groups=4",)
LAYOUTS = [(tp, pp, dp) for tp in (1, 2, 4) for pp in (1, 2) for dp in (1, 2, 3) if tp * pp * dp <= 8]


def initial_digests(rank: int, world_size: int, stages: tuple[int, ...], *overrides: str) -> list[str]:
    """Digest of the state before the first step, for each stage. All stages use the same groups."""
    digests = []
    run = start(*overrides, zero(stages[0]))
    for stage in stages:
        if stage != stages[0]:
            zero_optimization = {"zero_optimization": {"stage": stage}}
            config = run.config.model_copy(update={"deepspeed": zero_optimization})
            model_chunks = build_model(config, run.groups)
            run = Run(config, run.groups, model_chunks, build_engine(model_chunks, config, run.groups))
        digests.append(digest(whole_state(run)))
    return digests


@pytest.mark.slow
def test_every_layout_and_stage_starts_from_the_same_bits() -> None:
    """44 combinations: (TP, PP, DP) in {1, 2, 4} x {1, 2} x {1, 2, 3} with at most 8 processes, times the stages.

    The stages are 0 to 3 without a pipeline, and 0 and 1 with one. The weights have latents, so codes, scales and
    latents are compared.
    """
    found = {}
    for tp, pp, dp in LAYOUTS:
        stages = (0, 1, 2, 3) if pp == 1 else (0, 1)
        overrides = (*WIDE, *LATENTS, f"parallel.tensor={tp}", f"parallel.pipeline={pp}")
        digests = run_distributed(initial_digests, tp * pp * dp, stages, *overrides)[0]
        found |= {(tp, pp, dp, stage): value for stage, value in zip(stages, digests, strict=True)}
    assert len(found) == 44
    assert len(set(found.values())) == 1, found


def test_another_seed_starts_from_other_bits() -> None:
    """Negative control."""
    one, other = (run_distributed(initial_digests, 1, (0,), f"training.seed={seed}")[0] for seed in (1, 2))
    assert one != other


# ---- stages ----


def digest_after(rank: int, world_size: int, steps: int, *overrides: str) -> tuple[str, list[float]]:
    """Digest of everything after `steps` steps, and the gradient norms."""
    run = start(*overrides, f"training.steps={steps}")
    norms = [float(run.step(number).grad_norm) for number in range(1, steps + 1)]
    return digest(whole_state(run)), norms


CLIPPED = "optimizer.max_grad_norm=0.3"  # norms are about 0.6, so the clip factor acts on every step
# (ranks, steps, overrides); 32, 48, 64 and 96 rows over 3 ranks are uneven. 12 samples are several micro-batches
# everywhere.
STAGE_CASES: dict[str, tuple[Any, ...]] = {
    "DP 2": (2, 8, CLIPPED),
    "DP 3": (3, 8, CLIPPED),
    "DP 3 bf16": (3, 5, CLIPPED, BF16),
    "TP 2 SP DP 2": (4, 5, TP, SP, "model.sub_norm=true"),
    "bf16 gradients": (3, 5, BF16, "optimizer.gradient_dtype=bf16", "quantization.bits=4"),
    "each micro-batch": (3, 5, "optimizer.gradient_reduction=micro_batch", "quantization.embeddings=true"),
    "8-bit moments": (3, 5, CLIPPED, "optimizer.state_bits=8", "model.ffn_hidden_size=64"),
    "factored second moment": (3, 5, CLIPPED, *FACTORED, *LATENTS),
    "adafactor": (3, 5, CLIPPED, "optimizer.name=adafactor", "optimizer.low_bit_beta1=0.9"),
    "latents": (3, 5, CLIPPED, *LATENTS),
    "8-bit latents": (
        2,
        5,
        BF16,
        "quantization.latent_bits=8",
        "quantization.embeddings=true",
        "optimizer.state_bits=8",
        "model.ffn_hidden_size=64",
    ),
    "documents": (3, 5, "data.document_masking=true"),
    "none": (3, 5, BF16, "quantization.method=none"),
    "bitnet": (3, 5, "quantization.method=bitnet"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STAGE_CASES)
def test_all_zero_stages_leave_the_same_bits(case: str) -> None:
    """Codes, scales, moments, high-precision parameters and their moments, and the norm of each step."""
    ranks, steps, *overrides = STAGE_CASES[case]
    found = {stage: run_distributed(digest_after, ranks, steps, *overrides, zero(stage))[0] for stage in range(4)}
    assert len({value for value, _ in found.values()}) == 1, {stage: value[:12] for stage, (value, _) in found.items()}
    assert all(norms == found[0][1] for _, norms in found.values())


def test_offloaded_moments_and_latents_change_no_bit() -> None:
    """The means of a factored second moment stay on the device."""
    offload = 'deepspeed.zero_optimization.offload_optimizer={"device": "cpu"}'
    wanted = run_distributed(digest_after, 2, 3, zero(1), *LATENTS, *FACTORED)[0]
    for stage in (1, 2, 3):
        assert run_distributed(digest_after, 2, 3, zero(stage), offload, *LATENTS, *FACTORED)[0] == wanted


def test_when_gradients_are_summed_changes_the_last_bits_only() -> None:
    """Negative control of the test above, and the reason why all stages use one order of sums.

    With gradient_reduction "micro_batch" gradients are summed over ranks first, and the bits differ.
    """
    once, often = (
        run_distributed(digest_after, 3, 3, zero(2), f"optimizer.gradient_reduction={when}")[0]
        for when in ("step", "micro_batch")
    )
    assert once[0] != often[0]
    assert once[1] == pytest.approx(often[1], rel=1e-4)


# ---- what a stage keeps and sends ----


def kept_and_sent(rank: int, world_size: int, *overrides: str) -> dict[str, Any]:
    """Largest gradient memory when a gradient arrives in a backward pass, codes held, and bytes sent by kind."""
    run = start(*overrides)
    run.step(1)  # stage 3 learns the order of the layers
    largest = 0
    reducer, low_bit = run.optimizer.reducer, run.optimizer.low_bit
    deliver = reducer._deliver

    def watched(buffer: Any, mean: Tensor) -> None:
        nonlocal largest
        deliver(buffer, mean)
        whole = sum(g.local.nbytes for g in low_bit.gradients if g.local is not None)
        largest = max(largest, whole + sum(g.mean.nbytes for g in low_bit.gradients if g.mean is not None))

    reducer._deliver = watched  # type: ignore[method-assign]
    BYTES_SENT.clear()
    run.step(2)
    weights = sum(weight.numel for weight in low_bit_matrices(run.model_chunks))
    held = sum(weight.codes.nbytes for weight in low_bit_matrices(run.model_chunks))
    high_precision = sum(shard.parameter.layout.rows * shard.parameter.layout.columns for shard in run.optimizer.shards)
    return {
        "weights": weights,
        "other": high_precision,
        "largest": largest,
        "codes": held,
        "sent": dict(BYTES_SENT),
    }


ONE_MICRO_BATCH = "training.global_batch_size=8"  # 4 ranks with 2 samples each


def test_stages_keep_what_they_promise() -> None:
    """4 ranks. Codes take a quarter of a byte per weight, and a quarter of that in stage 3.

    With several micro-batches gradients take 4 bytes per weight until the last backward. With one they never take much
    more than the owned quarter and the few gradients in flight.
    """
    facts = {stage: run_distributed(kept_and_sent, 4, zero(stage), ONE_MICRO_BATCH)[0] for stage in range(4)}
    weights = facts[0]["weights"]
    assert [facts[stage]["codes"] for stage in range(4)] == [weights // 4] * 3 + [weights // 16]
    several = run_distributed(kept_and_sent, 4, zero(1), "training.global_batch_size=16")[0]
    assert several["largest"] > 3 * weights  # all but one of eight, whole
    for stage in range(4):
        assert facts[stage]["largest"] < several["largest"] / 2


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_bytes_sent_are_those_of_the_tables(micro_batches: int) -> None:
    """docs/parallelism.md: per rank, with D = 4, W low-bit weights and H others (H is summed in fp32 as well).

    A code travels as 2 bits, an eighth of bf16: W/4 * 3/4 bytes. In stage 3 this is sent once for the forward and once
    for the backward of each micro-batch, except for matrices that are used twice in a row: the last matrix in forward
    and backward, and the first in the backward and in the forward of the next micro-batch. No matrix is gathered
    without being used.
    """
    batch = f"training.global_batch_size={8 * micro_batches}"
    for stage in range(4):
        facts = run_distributed(kept_and_sent, 4, zero(stage), batch)[0]
        weights, other, sent = facts["weights"], facts["other"], facts["sent"]
        passes = 2 if stage == 0 else 1  # to the owners and, in stage 0, back to all
        assert sent["gradients"] == pytest.approx(
            passes * 4 * (weights + other) * 3 / 4, abs=64
        )  # whole elements, 4 bytes
        gather = weights / 4 * 3 / 4
        if stage == 0:
            assert sent.get("codes", 0) == 0
        elif stage < 3:
            assert sent["codes"] == gather
        else:
            last, first = 32 * 48 / 4 * 3 / 4, 64 * 32 / 4 * 3 / 4  # down_proj of the last layer, qkv of the first
            assert sent["codes"] == micro_batches * (2 * gather - last) - (micro_batches - 1) * first


def test_micro_batch_reduction_sends_that_many_times_more() -> None:
    batch, often = "training.global_batch_size=24", "optimizer.gradient_reduction=micro_batch"
    once, each = (run_distributed(kept_and_sent, 4, zero(2), batch, *more)[0] for more in ((), (often,)))
    assert each["sent"]["gradients"] == pytest.approx(3 * once["sent"]["gradients"], rel=1e-3)


# ---- equal gradients ----


def from_equal_gradients(rank: int, world_size: int, *overrides: str) -> str:
    """Five updates. Gradients are a function of (step, logical matrix), and each shard gets its part."""
    run = start(*overrides)
    low_bit = run.optimizer.low_bit
    for step in range(1, 6):
        for rows in low_bit.rows:
            layout = rows.weight.layout
            assert layout is not None
            whole = torch.empty(rows.weight.rows, layout.columns)
            columns = slice(layout.column_offset, layout.column_offset + layout.columns)
            for matrix, row, local, count in layout.pieces(0, rows.weight.rows):
                generator = torch.Generator().manual_seed(matrix.id + step)
                logical = torch.randn(matrix.rows, matrix.columns, generator=generator)
                whole[local : local + count] = logical[row : row + count, columns]
            rows.gradient.local = whole
            rows.gradient.send()
            rows.gradient.receive(whole[rows.start : rows.stop])
        low_bit.begin_step(StepRates(step, 5e-3, 5e-3))
        # Any number that is not below the norm of these gradients will do.
        low_bit.update(torch.tensor(0.5), torch.tensor(1000.0))
        low_bit.gather_codes()
    low_bit_state = {
        name: tensor
        for name, tensor in logical_state(run.model_chunks, run.optimizer).items()
        if not name.startswith("parameter")
    }
    return digest(assemble(low_bit_state))


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["optimizer.second_moment=full", "optimizer.second_moment=factored"])
def test_equal_gradients_give_equal_codes_in_every_layout(setting: str) -> None:
    """Draws depend on the logical matrix only. TP, PP, DP and the stage change no draw.

    The means of a factored second moment are made of exact sums, so they too are equal.
    """
    cases = [
        (1,), (2, TP), (2, PP), (2,), (3, zero(1)), (4, TP, PP), (4, TP, zero(3)), (6, TP, zero(2)),
        (8, TP, PP, zero(1)), (4, "parallel.tensor=4"),
    ]  # fmt: skip
    found = {str(case): run_distributed(from_equal_gradients, case[0], *WIDE, setting, *case[1:])[0] for case in cases}
    assert len(set(found.values())) == 1, found


# ---- the forward ----


def hidden_states(rank: int, world_size: int, *overrides: str) -> Tensor:
    """What the final norm gives for one batch, [sequence, batch, hidden]."""
    run = start(*overrides)
    captured: list[Tensor] = []
    run.model_chunks[0].decoder.final_layernorm.register_forward_hook(
        lambda _, __, output: captured.append(output.detach())
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(64, (2, 16), generator=generator)
    with torch.no_grad():
        run.model_chunks[0](tokens, torch.arange(16).expand(2, 16), None)
    return captured[0]


@pytest.mark.parametrize(("bits", "sub_norm"), [("ternary", "false"), (4, "true")])
def test_the_forward_of_all_layers_is_bit_equal_under_tensor_parallelism(bits: str | int, sub_norm: str) -> None:
    """Partial sums of int8 activations and codes are integers below 2^24, which fp32 adds up exactly in any order.

    The feed-forward width is at least 16 per rank. The tail of a row that fills no vector register would be computed
    with another exponential function.
    """
    model = (*WIDE, "model.ffn_hidden_size=64", f"quantization.bits={bits}", f"model.sub_norm={sub_norm}")
    wanted = run_distributed(hidden_states, 1, *model)[0]
    for size in (2, 4):
        found = run_distributed(hidden_states, size, *model, f"parallel.tensor={size}")
        assert all(torch.equal(states, wanted) for states in found)
    parts = run_distributed(hidden_states, 2, *model, TP, SP)
    assert torch.equal(torch.cat(parts), wanted)
