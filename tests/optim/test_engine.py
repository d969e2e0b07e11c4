"""CombinedOptimizer: one gradient norm, one clip factor, learning rates as scheduled, AdamW of DeepSpeed as torch's."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from deepspeed.utils.config import get_timers_config

from dqt_dist.kernels.low_bit_update import GRADIENT_LIMIT
from dqt_dist.optim.deepspeed_adapter import deepspeed_config
from dqt_dist.optim.engine import clip_factor
from dqt_dist.optim.factored import MEANS
from dqt_dist.optim.schedule import step_rates
from dqt_dist.training.step import train_step
from tests.distributed import run_distributed
from tests.parallel.runs import (
    Record,
    Whole,
    assert_equal,
    fraction_of_codes_that_differ,
    recorded,
    start,
    whole_state,
)
from tests.small import random_batches, small_config
from tests.tolerances import ELEMENTWISE_FP32, NETWORK_FP32

STEPS = 3
ZERO_1 = "deepspeed.zero_optimization.stage=1"
BF16 = "quantization.compute=bf16"
SUB_NORM = "model.sub_norm=true"
TP, PP, SP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"

# A norm is the root of a sum of squares of fp32 gradients. Two evaluations differ by as much as the gradients, 1e-6 at
# the first step.
NORM_FP32 = 1e-6


# ---- the global norm ----

NORM_CASES = {
    "one": (1,),
    "TP 2": (2, TP),
    "TP 2 sub-norms": (2, TP, SUB_NORM),
    "TP 2 sequence sub-norms": (2, TP, SP, SUB_NORM),
    "PP 2": (2, PP),
    "TP 2 PP 2": (4, TP, PP),
    "DP 2": (2,),
    "DP 3 ZeRO 1": (3, ZERO_1),
    "TP 2 DP 2 ZeRO 1": (4, TP, ZERO_1),
    "TP 2 bitnet": (2, TP, "quantization.method=bitnet"),
    "bf16": (1, BF16),
    "TP 2 bf16": (2, TP, BF16),
    "DP 3 ZeRO 1 bf16": (3, ZERO_1, BF16),
    "TP 2 DP 2 ZeRO 1 bf16": (4, TP, ZERO_1, BF16),
}


def norm(gradients: Whole) -> float:
    return float(torch.cat([gradient.double().flatten() for gradient in gradients.values()]).norm())


@pytest.mark.parametrize("case", NORM_CASES)
def test_the_norm_counts_every_element_of_the_model_once(case: str) -> None:
    world_size, *overrides = NORM_CASES[case]
    record = recorded(world_size, STEPS, *overrides)
    for gradients, grad_norm in zip(record.gradients, record.grad_norms, strict=True):
        assert len(gradients) == 3 + 2 * (9 + 2 * record.config.model.sub_norm)
        assert grad_norm == pytest.approx(norm(gradients), rel=NORM_FP32)


@pytest.mark.parametrize("case", [case for case in NORM_CASES if "bf16" not in case])
def test_the_norm_equals_that_of_one_process(case: str) -> None:
    world_size, *overrides = NORM_CASES[case]
    alone = [override for override in overrides if override not in (TP, PP, SP, ZERO_1)]
    assert recorded(world_size, STEPS, *overrides).grad_norms[0] == pytest.approx(
        recorded(1, STEPS, *alone).grad_norms[0], rel=NORM_FP32
    )


@pytest.mark.parametrize("stage", [(), (ZERO_1,)])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_micro_batches_of_any_size_give_the_same_norm_and_gradients(compute: str, stage: tuple[str, ...]) -> None:
    """12, 6 or 4 micro-batches of the same 12 samples.

    Megatron's schedule and DeepSpeed can each divide by the number of micro-batches. If the two divided, the norm would
    be 12, 6 and 4 times too small.
    """
    records = [
        recorded(1, 1, f"quantization.compute={compute}", *stage, f"training.micro_batch_size={size}")
        for size in (2, 1, 3)
    ]
    # bf16 rounds each micro-batch's gradient to 8 bits.
    rel = NORM_FP32 if compute == "fp32" else 2e-3
    for record in records[1:]:
        assert record.grad_norms[0] == pytest.approx(records[0].grad_norms[0], rel=rel)
        if compute == "fp32":
            for name, gradient in records[0].gradients[0].items():
                NETWORK_FP32.assert_close(record.gradients[0][name], gradient, name)


def test_deepspeed_measures_no_throughput() -> None:
    """DeepSpeed's timer waits for the device twice per step. Control: by default the timer is on."""
    config = small_config()
    assert not get_timers_config(deepspeed_config(config, 1)).enabled
    assert get_timers_config({}).enabled


# ---- clipping ----


def test_the_clip_factor_is_the_ratio_of_the_norms_and_never_above_one() -> None:
    assert float(clip_factor(torch.tensor(4.0), 1.0)) == pytest.approx(0.25, rel=1e-5)  # the norm plus 1e-6
    assert float(clip_factor(torch.tensor(0.5), 1.0)) == 1.0
    assert float(clip_factor(torch.tensor(4.0), 0.0)) == 1.0
    for bad in ("inf", "nan", str(GRADIENT_LIMIT)):
        assert float(clip_factor(torch.tensor(float(bad)), 1.0)) == 0.0
        assert float(clip_factor(torch.tensor(float(bad)), 0.0)) == 0.0


@pytest.mark.parametrize("layout", [(1,), (2, ZERO_1), (1, BF16), (2, ZERO_1, BF16)], ids=str)
def test_clipping_scales_what_both_optimizers_see(layout: tuple[Any, ...]) -> None:
    """The moment is (1 - beta1) * clip * gradient.

    AdamW's first update does not depend on the size of the gradient, so the test compares the moment.
    """
    world_size, *overrides = layout
    free = recorded(world_size, 1, *overrides, "optimizer.max_grad_norm=0")
    clipped = recorded(world_size, 1, *overrides, "optimizer.max_grad_norm=0.01")
    assert free.grad_norms == clipped.grad_norms and free.grad_norms[0] > 0.1
    factor = 0.01 / (free.grad_norms[0] + 1e-6)
    for kind in ("parameter", "low_bit"):
        for name, gradient in free.gradients[0].items():
            moment = f"{kind}.exp_avg/{name}"
            if moment in free.final:
                ELEMENTWISE_FP32.assert_close(free.final[moment], 0.1 * gradient, moment)
                ELEMENTWISE_FP32.assert_close(clipped.final[moment], 0.1 * factor * gradient, moment)


# ---- gradients that are not finite ----


def poisoned(rank: int, world_size: int, bad_step: int, *overrides: str) -> tuple[Whole, Whole, Whole, float]:
    """States before and after step `bad_step`, where one rank has gradients that are not finite, and after the next."""
    run = start(*overrides)
    for number in range(1, bad_step):
        run.step(number)
    before = {name: tensor.clone() for name, tensor in whole_state(run).items()}
    batches = random_batches(run.config, bad_step, run.groups.data.rank(), run.groups.data.size())
    if run.groups.data.rank() == world_size - 1:
        batches[0]["loss_mask"] *= float("inf")  # the loss is inf / inf = nan, and so is every gradient
    result = train_step(run.engine, run.model_chunks, batches, run.forward_backward)
    after = {name: tensor.clone() for name, tensor in whole_state(run).items()}
    run.step(bad_step + 1)
    return before, after, whole_state(run), float(result.grad_norm)


@pytest.mark.parametrize("bad_step", [1, 3])
@pytest.mark.parametrize(
    "layout",
    [(1,), (2, ZERO_1), (1, BF16), (2, ZERO_1, BF16), (1, "optimizer.name=adafactor", "optimizer.low_bit_beta1=0.9")],
    ids=str,
)
def test_a_gradient_that_is_not_finite_moves_nothing(layout: tuple[Any, ...], bad_step: int) -> None:
    """At step 3 the moments are not zero: with a zero gradient they alone would change codes and parameters."""
    world_size, *overrides = layout
    before, after, later, grad_norm = run_distributed(poisoned, world_size, bad_step, *overrides)[0]
    assert not torch.tensor(grad_norm).isfinite()
    assert_equal(after, before, ("codes/", "scale/", "parameter/"))
    assert all(tensor.isfinite().all() for tensor in [*after.values(), *later.values()] if tensor.is_floating_point())
    changed = [name for name in after if not torch.equal(later[name], after[name])]
    assert any(name.startswith("codes/") for name in changed) and "parameter/embed_tokens" in changed  # the run goes on


def with_infinite_loss(rank: int, world_size: int) -> list[tuple[bool, int, int, int]]:
    """After each of three steps, of which the second has an infinite loss and finite gradients on the last rank."""
    run, seen = start(ZERO_1), []

    def infinite(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        return run.forward_backward(batches) / float(rank != world_size - 1)

    for number in (1, 2, 3):
        before = whole_state(run)
        codes = {name: tensor.clone() for name, tensor in before.items() if name.startswith("codes/")}
        batches = random_batches(run.config, number, run.groups.data.rank(), run.groups.data.size())
        train_step(run.engine, run.model_chunks, batches, infinite if number == 2 else run.forward_backward)
        after, optimizer = whole_state(run), run.optimizer
        changed = any(not torch.equal(tensor, after[name]) for name, tensor in codes.items())
        counts = (optimizer.skipped_steps, optimizer.skipped_in_a_row, optimizer.skipped_in_a_row_on_host)
        seen.append((changed, *(int(count) for count in counts)))
    return seen


def test_a_loss_that_is_not_finite_on_one_rank_is_a_skipped_step_on_all() -> None:
    seen, of_other = run_distributed(with_infinite_loss, 2)
    assert seen == [(True, 0, 0, 0), (False, 1, 1, 1), (True, 1, 0, 0)]
    assert [counts for _, *counts in of_other] == [counts for _, *counts in seen]


# ---- DeepSpeed's part ----


def reference_adamw(record: Record) -> Whole:
    """torch.optim.AdamW on whole fp32 tensors with the recorded gradients, clipped by hand."""
    optimizer = record.config.optimizer
    whole = {
        name.removeprefix("parameter/"): tensor.clone().requires_grad_()
        for name, tensor in record.initial.items()
        if name.startswith("parameter/")
    }
    groups = [
        {
            "params": [tensor],
            "decay": float(tensor.shape[1] > 1),
            "rate": "low_bit_learning_rate" if name.endswith("_proj") else "learning_rate",
            "betas": (optimizer.low_bit_beta1 if name.endswith("_proj") else optimizer.beta1, optimizer.beta2),
        }
        for name, tensor in whole.items()
    ]
    adamw = torch.optim.AdamW(groups, eps=optimizer.epsilon)
    for step, (gradients, grad_norm) in enumerate(zip(record.gradients, record.grad_norms, strict=True), start=1):
        rates = step_rates(step, record.config)
        for group in adamw.param_groups:
            group["lr"] = getattr(rates, group["rate"])
            group["weight_decay"] = group["decay"] * rates.weight_decay
        for name, tensor in whole.items():
            tensor.grad = gradients[name] * min(1.0, optimizer.max_grad_norm / (grad_norm + 1e-6))
        adamw.step()
    return {f"parameter/{name}": tensor.detach() for name, tensor in whole.items()}


SCHEDULE = ("optimizer.schedule=linear", "optimizer.warmup_steps=2", "optimizer.max_grad_norm=0.3")
SCHEDULE += ("optimizer.weight_decay_steps=3", "optimizer.low_bit_beta1=0.7")


@pytest.mark.parametrize("method", ["dqt", "none"])
@pytest.mark.parametrize("layout", [(1,), (2, ZERO_1), (1, BF16), (4, TP, ZERO_1, BF16), (2, PP)], ids=str)
def test_high_precision_parameters_follow_torch_adamw(layout: tuple[Any, ...], method: str) -> None:
    """Masters are fp32 in every stage and precision. Decay acts on matrices only, and up to its last step. Warm-up and
    clipping are applied."""
    world_size, *overrides = layout
    record = recorded(world_size, STEPS, f"quantization.method={method}", *SCHEDULE, *overrides)
    assert max(record.grad_norms) > record.config.optimizer.max_grad_norm
    for name, wanted in reference_adamw(record).items():
        assert record.final[name].dtype == torch.float32
        ELEMENTWISE_FP32.assert_close(record.final[name], wanted, name)


@pytest.mark.parametrize("stage", [(), (ZERO_1,)])
def test_bf16_masters_start_as_the_parameters_they_stand_for(stage: tuple[str, ...]) -> None:
    """No step, decay or rounding comes before the first one."""
    found, fp32 = recorded(1, STEPS, BF16, *stage).initial, recorded(1, STEPS).initial
    for name in (name for name in fp32 if name.startswith("parameter")):
        assert torch.equal(found[name], fp32[name].bfloat16().float()), name


def rates(rank: int, world_size: int, *overrides: str) -> list[tuple[list[float], float]]:
    """(rates of the high-precision groups, rate of the low-bit update) of each step."""
    run = start(*overrides)
    seen: list[tuple[list[float], float]] = []
    update = run.optimizer.low_bit.update

    def watched(clip: torch.Tensor, norm: torch.Tensor) -> None:
        rates = run.optimizer.low_bit.rates
        seen.append(([float(group["lr"]) for group in run.optimizer.param_groups], rates.low_bit_learning_rate))
        update(clip, norm)

    run.optimizer.low_bit.update = watched  # type: ignore[method-assign]
    for number in range(1, run.config.training.steps + 1):
        run.step(number)
    return seen


@pytest.mark.parametrize("zero", [0, 1])
def test_both_learning_rates_follow_the_schedule(zero: int) -> None:
    """Warm-up 2 of 6 steps, then a line to a tenth: 1/2, 1, then down by 0.9/4 a step."""
    overrides = ["optimizer.schedule=linear", "optimizer.warmup_steps=2", "optimizer.min_learning_rate_ratio=0.1"]
    overrides += ["training.steps=6", f"deepspeed.zero_optimization.stage={zero}"]
    factors = [0.5, 1.0, 0.775, 0.55, 0.325, 0.1]
    for (high_precision, low_bit), factor in zip(run_distributed(rates, 1, *overrides)[0], factors, strict=True):
        assert high_precision == pytest.approx([1e-2 * factor] * len(high_precision), rel=1e-6)
        assert low_bit == pytest.approx(5e-3 * factor)


def facts_of_deepspeed(rank: int, world_size: int, *overrides: str) -> dict[str, Any]:
    run = start(*overrides)
    engine, optimizer = run.engine, run.optimizer
    low_bit_codes = {id(rows.weight.codes) for rows in optimizer.low_bit.rows}
    managed = list({id(s.master): s.master for s in optimizer.shards if s.master is not None}.values())
    return {
        "stage": engine.zero_optimization_stage(),
        "batch": engine.train_batch_size(),
        "micro_batches": engine.gradient_accumulation_steps(),
        "bf16": engine.bfloat16_enabled(),
        "clipping": engine.gradient_clipping(),
        "allgather_bucket_size": engine.zero_allgather_bucket_size(),
        "masters": {str(p.dtype) for p in managed},
        "elements": sum(p.numel() for p in managed),
        "codes_are_parameters": any(id(p) in low_bit_codes for p in engine.module.parameters()),
    }


def test_the_deepspeed_section_passes_through_and_the_rest_is_derived() -> None:
    bucket = "deepspeed.zero_optimization.allgather_bucket_size=12344"
    facts = run_distributed(facts_of_deepspeed, 2, ZERO_1, bucket)[0]
    assert (facts["stage"], facts["allgather_bucket_size"]) == (1, 12344)
    assert (facts["batch"], facts["micro_batches"], facts["bf16"], facts["clipping"]) == (12, 3, False, 0.0)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_zero_1_divides_the_fp32_masters_and_never_sees_a_code(compute: str) -> None:
    precision = f"quantization.compute={compute}"
    whole = run_distributed(facts_of_deepspeed, 1, precision)[0]
    shares = run_distributed(facts_of_deepspeed, 2, precision, ZERO_1)
    assert whole["elements"] == 2 * 64 * 32 + 5 * 32  # embedding, head, norms of two layers and the last
    for facts in (whole, *shares):
        assert facts["masters"] == {"torch.float32"} and not facts["codes_are_parameters"]
    assert all(whole["elements"] / 2 <= facts["elements"] < whole["elements"] * 0.6 for facts in shares)


# ---- Adafactor ----


@pytest.mark.parametrize("beta1", ["null", "0.9"])
def test_adafactor_sharded_equals_one_process(beta1: str) -> None:
    """Adafactor's means are taken over whole logical matrices, and no rank holds a whole matrix.

    Rows are divided over data-parallel ranks, rows or columns over tensor-parallel ranks.
    """
    overrides = ("optimizer.name=adafactor", f"optimizer.low_bit_beta1={beta1}")
    found, wanted = recorded(4, STEPS, *overrides, TP, ZERO_1), recorded(1, STEPS, *overrides)
    first_found, first_wanted = recorded(4, 1, *overrides, TP, ZERO_1), recorded(1, 1, *overrides)
    moments = [name for name in wanted.final if name.startswith("low_bit.")]
    assert {name.split("/")[0].removeprefix("low_bit.") for name in moments} == set(MEANS) | (
        set() if beta1 == "null" else {"exp_avg"}
    )
    for name in moments:
        NETWORK_FP32.assert_close(first_found.final[name], first_wanted.final[name], name)
    assert_equal(first_found.final, first_wanted.final, "codes/")
    assert fraction_of_codes_that_differ(wanted.final, wanted.initial, wanted.config) > 0.05
    assert fraction_of_codes_that_differ(found.final, wanted.final, wanted.config) <= 2e-3


# ---- memory is freed with the run ----


def parameters_left(rank: int, world_size: int, *overrides: str) -> tuple[int, int]:
    """Number of parameters of a run, and how many of them are alive after the last reference to the run is gone."""
    run = start(*overrides)
    run.step(1)
    parameters = [weakref.ref(parameter) for parameter in run.model_chunks.parameters()]
    del run
    while gc.collect():
        pass
    return len(parameters), sum(parameter() is not None for parameter in parameters)


@pytest.mark.parametrize("fused", ["false", "true"])
def test_an_engine_nobody_refers_to_leaves_no_memory(fused: str) -> None:
    """Python's garbage collector does not see hooks. A hook that refers to its parameter keeps it alive."""
    overrides = ("training.global_batch_size=2", "optimizer.max_grad_norm=0", f"optimizer.fused_backward={fused}")
    assert run_distributed(parameters_left, 1, *overrides)[0] == (7, 0)
