"""What fields say about each other, and what a number of processes says about them: refusals, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from dqt_dist.config import ProcessGrid, check_world, load_config, process_grid
from tests.config.files import refusal, world_refusal

# ---- fields against each other ----


FUSED = ("optimizer.fused_backward=true", "optimizer.max_grad_norm=0")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.num_query_groups=3"],
            "model.num_query_groups: 3 groups do not divide model.num_attention_heads = 4; use one of 1, 2, 4",
        ),
        (
            ["model.hidden_size=132", "model.num_attention_heads=8"],
            "model.hidden_size: 132 is not divisible by model.num_attention_heads = 8; nearest: 128 or 136",
        ),
        (["model.hidden_size=12"], "gives heads of width 3, but rotary embedding turns pairs; nearest: 8 or 16"),
        (["parallel.tensor=8"], "model.num_attention_heads: 4 is not divisible by parallel.tensor = 8; nearest: 8"),
        (
            ["parallel.tensor=2", "model.num_query_groups=1"],
            "model.num_query_groups: 1 is not divisible by parallel.tensor = 2; nearest: 2",
        ),
        (
            ["parallel.tensor=2", "model.vocab_size=2047"],
            "model.vocab_size: 2047 is not divisible by parallel.tensor = 2; nearest: 2046 or 2048",
        ),
        (
            ["parallel.tensor=2", "model.ffn_hidden_size=300"],
            "model.ffn_hidden_size: 300 is not divisible by 4 * parallel.tensor = 8; a group of packed codes "
            "and a Philox draw hold 4 codes",
        ),
        (
            ["parallel.tensor=4", "model.hidden_size=136"],
            "model.hidden_size: 136 is not divisible by 4 * parallel.tensor = 16",
        ),
        (["logging.profile_steps=[5,3]"], "logging.profile_steps: [5, 3] ends before it begins; write [first, last]"),
        (
            ["training.steps=500", "logging.profile_steps=[1,101]"],
            "logging.profile_steps: [1, 101] are 101 steps, and a trace holds every operation of each; use at most 100",
        ),
        (
            ["training.steps=30", "logging.profile_steps=[29,31]"],
            "logging.profile_steps: [29, 31] ends after training.steps = 30; use steps of 1 to 30",
        ),
        (["parallel.sequence=true"], "parallel.sequence: true needs parallel.tensor > 1, which is 1"),
        (
            ["parallel.sequence=true", "parallel.tensor=2", "model.seq_length=127"],
            "model.seq_length: 127 is not divisible by parallel.tensor = 2; nearest: 126 or 128",
        ),
        (["parallel.pipeline=3"], "model.num_layers: 4 is not divisible by parallel.pipeline = 3; nearest: 3 or 6"),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=3"],
            "model.num_layers: 4 is not divisible by parallel.pipeline = 2 * parallel.virtual_pipeline = 3, "
            "6 chunks; nearest: 6",
        ),
        (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline: 2 chunks need parallel.pipeline > 1, which is 1"),
        (
            ["quantization.method=bitnet", "quantization.bits=8"],
            'quantization.bits: 8 does not go with quantization.method = "bitnet"',
        ),
        (
            ["quantization.method=none", "quantization.activation=int8"],
            'quantization.activation: "int8" does not go with quantization.method = "none"',
        ),
        (
            ["quantization.method=none", "quantization.compute=fp8"],
            'quantization.compute: "fp8" does not go with quantization.method = "none"',
        ),
        (
            ["quantization.compute=fp8", "quantization.activation=int8"],
            'quantization.activation: "int8" does not go with quantization.compute = "fp8"',
        ),
        (
            ["quantization.activation=e4m3"],
            'quantization.activation: "e4m3" does not go with quantization.compute = "bf16"',
        ),
        (
            ["quantization.compute=int8", "quantization.activation=none"],
            'quantization.activation: "none" does not go with quantization.compute = "int8"',
        ),
        (
            ["quantization.compute=fp8", "quantization.bits=8"],
            'quantization.compute: "fp8" holds codes of up to 4 bits exactly, quantization.bits is 8; use "bf16"',
        ),
        (
            ["quantization.compute=fp8", "model.ffn_hidden_size=168"],
            "model.ffn_hidden_size: 168 gives 168 features a rank, which fp8 products need in multiples of 16; "
            "nearest: 160 or 176",
        ),
        (
            ["quantization.compute=fp8", "quantization.embeddings=true", "model.vocab_size=1000"],
            "model.vocab_size: 1000 gives 1000 features a rank, which fp8 products need in multiples of 16; "
            "nearest: 992 or 1008",
        ),
        (
            ["optimizer.state_bits=8", "model.ffn_hidden_size=168"],
            "model.ffn_hidden_size: 168 is not divisible by 32 * parallel.tensor = 32, as optimizer.state_bits = "
            "8 needs",
        ),
        (
            ["optimizer.name=adafactor", "optimizer.state_bits=8"],
            'optimizer.state_bits: 8 is for optimizer.name = "adamw"; use 32',
        ),
        (
            ["quantization.latent_sigmas=4"],
            "quantization.latent_sigmas: 4 is about latents, and there are none",
        ),
        (
            ["quantization.latent_threshold=2"],
            "quantization.latent_threshold: 2 is about latents, and there are none",
        ),
        (
            ["quantization.scale_refit_interval=5"],
            "quantization.scale_refit_interval: 5 refits scales from latents, and there are none; use 0",
        ),
        (
            ["quantization.method=none", "quantization.latent_bits=4"],
            'quantization.latent_bits: 4 does not go with quantization.method = "none", whose weights are no integers',
        ),
        (
            ["quantization.bits=4", "quantization.latent_bits=4"],
            "quantization.latent_bits: 4 bits are stored for codes of quantization.bits = 4",
        ),
        (
            ["quantization.bits=5", "quantization.latent_bits=8"],
            "quantization.latent_bits: 8 bits are stored for codes of quantization.bits = 5",
        ),
        (
            ["quantization.bits=2", "quantization.latent_bits=6", "quantization.latent_threshold=2"],
            "quantization.latent_threshold: 2 is for ternary codes, quantization.bits is 2; leave it out",
        ),
        (
            ["quantization.latent_bits=4", "quantization.latent_threshold=8"],
            "quantization.latent_threshold: 8 is more than 7, the largest latent of 4 bits, so every code would be 0",
        ),
        (
            [
                *("quantization.latent_bits=4", "quantization.scale_refit_interval=1"),
                "quantization.scale_power_of_two=true",
            ],
            "quantization.scale_power_of_two: true does not go with quantization.scale_refit_interval = 1",
        ),
        (
            ["optimizer.name=adafactor", "optimizer.second_moment=full"],
            'optimizer.second_moment: "full" does not go with optimizer.name = "adafactor"; use "factored"',
        ),
        (
            ["optimizer.second_moment=factored", "optimizer.fused_backward=true", "optimizer.max_grad_norm=0"],
            'optimizer.second_moment: "factored" needs the sums over whole matrices before a row is updated',
        ),
        (
            ["optimizer.second_moment=factored", "quantization.method=bitnet"],
            'optimizer.second_moment: "factored" is about low-bit weights, and quantization.method = "bitnet" has none',
        ),
        (
            ["optimizer.fused_backward=true"],
            "optimizer.max_grad_norm is 1; use 0, or fused_backward = false",
        ),
        (
            ["training.replay_suspicious_steps=true"],
            "training.replay_suspicious_steps: true compares two executions of a step bit for bit, but "
            "training.deterministic is false",
        ),
        (
            ["training.replay_suspicious_steps=true", "training.deterministic=true", *FUSED],
            "training.replay_suspicious_steps: true executes a step again from the same weights, but",
        ),
        (
            [*FUSED, "training.spike_deviations=4"],
            "training.spike_deviations: 4 skips a step when its loss is known, but optimizer.fused_backward = true",
        ),
        (
            ["training.recompute_layers=2"],
            'training.recompute_layers: 2 blocks are to compute again, but training.recompute = "none"',
        ),
        (
            ["training.recompute=mlp", "training.recompute_layers=3", "parallel.pipeline=2"],
            "training.recompute_layers: 3 is more than the 2 blocks of a pipeline stage; use at most 2",
        ),
        (
            ["training.cuda_graph=true", "deepspeed.zero_optimization.stage=3"],
            "training.cuda_graph: true needs weights that stay where they are, but ZeRO stage 3 gathers them",
        ),
        (
            ["training.cuda_graph=true", "optimizer.fused_backward=true", "optimizer.max_grad_norm=0"],
            "training.cuda_graph: true does not go with optimizer.fused_backward = true",
        ),
        (
            ["optimizer.warmup_steps=101"],
            "optimizer.warmup_steps: 101 is more than training.steps = 100; use at most 100",
        ),
        (
            ["optimizer.schedule=wsd", "optimizer.warmup_steps=50", "optimizer.decay_steps=60"],
            "optimizer.decay_steps: 60 + optimizer.warmup_steps = 50 is more than training.steps = 100; use "
            "a decay of at most 50",
        ),
        (
            ["optimizer.low_bit_schedule_steps=101"],
            "optimizer.low_bit_schedule_steps: 101 is more than training.steps = 100; use at most 100",
        ),
        (
            ["optimizer.low_bit_schedule_steps=40", "optimizer.warmup_steps=50"],
            "optimizer.warmup_steps: 50 is more than optimizer.low_bit_schedule_steps = 40; use at most 40",
        ),
        (
            ["optimizer.schedule=linear", "optimizer.second_stage_ratio=0.5"],
            'optimizer.second_stage_ratio: 0.5 does not go with optimizer.schedule = "linear"',
        ),
        (
            ["deepspeed.zero_optimization.stage=2", "parallel.pipeline=2"],
            "deepspeed.zero_optimization.stage: 2 does not go with parallel.pipeline = 2: a pipeline needs many "
            "micro-batches",
        ),
        (
            ["deepspeed.zero_optimization.stage=3", "parallel.pipeline=2"],
            "use 1, which is enough here because low-bit weights are 8 times smaller than bf16 ones, or "
            "parallel.pipeline = 1",
        ),
        (
            ["parallel.context=2"],
            "parallel.context: 2 is not supported: in megatron-core attention over a split sequence",
        ),
        (
            ["deepspeed.zero_optimization.reduce_scatter=false"],
            "has no effect, as gradients are not reduced by DeepSpeed",
        ),
        (
            ["deepspeed.zero_optimization.stage=2", "deepspeed.zero_optimization.overlap_comm=true"],
            "deepspeed.zero_optimization.overlap_comm: has no effect in stage 2, only in stage 3; leave it out",
        ),
        (
            ["deepspeed.zero_optimization.stage=3", "deepspeed.zero_optimization.allgather_bucket_size=1000"],
            "deepspeed.zero_optimization.allgather_bucket_size: has no effect in stage 3, only in stage 1 and 2",
        ),
        (["deepspeed.zero_optimization.sub_group_size=1000"], "has no effect in stage 0, only in stage 3"),
        (
            ["deepspeed.zero_optimization.offload_optimizer.device=cpu"],
            "deepspeed.zero_optimization.offload_optimizer: needs a ZeRO stage",
        ),
        (
            ["deepspeed.zero_optimization.offload_optimizer.device=nvme"],
            'should be {"device": "cpu", "pin_memory": true}',
        ),
        (["deepspeed.zero_optimization.offload_param.device=cpu"], "leave it out and offload the optimizer's state"),
        (
            ["deepspeed.zero_optimization.stage=one"],
            'deepspeed.zero_optimization.stage: "one" is not valid; use 0, 1, 2 or 3',
        ),
        (
            ["checkpoint.interval=50", "checkpoint.keep_every=120"],
            "checkpoint.keep_every: 120 is not a multiple of checkpoint.interval = 50, so steps to keep would never be "
            "saved; nearest: 100 or 150",
        ),
        (["deepspeed.zero_optimization=1"], "deepspeed.zero_optimization: 1 is not valid; should be an object"),
        (
            ["deepspeed.zero_optimisation.stage=1"],
            "deepspeed.zero_optimisation: unknown key; did you mean 'zero_optimization'?",
        ),
        (
            ["deepspeed.train_batch_size=8"],
            "deepspeed.train_batch_size: is derived, so that two fields cannot disagree; use "
            "training.global_batch_size",
        ),
        (["deepspeed.train_micro_batch_size_per_gpu=8"], "use training.micro_batch_size"),
        (["deepspeed.gradient_accumulation_steps=8"], "use training.global_batch_size and training.micro_batch_size"),
        (["deepspeed.gradient_clipping=1"], "use optimizer.max_grad_norm"),
        (["deepspeed.bf16.enabled=true"], "use quantization.compute"),
        (["deepspeed.optimizer.type=Adam"], "use the optimizer section"),
        (["deepspeed.scheduler.type=x"], "use optimizer.schedule"),
        (["deepspeed.zero.stage=2"], "deepspeed.zero: unknown key; known here: zero_optimization, "),
        (
            ["deepspeed.zero_optimization.stgae=2"],
            "deepspeed.zero_optimization.stgae: unknown key; did you mean 'stage'?",
        ),
        (
            ["deepspeed.prescale_gradients=true"],
            "deepspeed.prescale_gradients: unknown key; known here: ",
        ),
        (
            ["model.vocab_size=10000001"],
            "model.vocab_size: 10000001 is not valid; should be less than or equal to 10000000",
        ),
        (
            ["training.eval_batches=1000001"],
            "eval_batches: 1000001 is not valid; should be less than or equal to 1000000",
        ),
        (["model.num_layers=10001"], "model.num_layers: 10001 is not valid; should be less than or equal to 10000"),
        (["deepspeed.comms_logger=3"], "deepspeed.comms_logger: 3 is not valid; should be an object"),
        (["deepspeed.dump_state=yes"], 'deepspeed.dump_state: "yes" is not valid; should be true or false'),
        (["deepspeed.steps_per_print=-1"], "-1 is not valid; should be a positive integer or null"),
        (["deepspeed.timers.throughputt.enabled=true"], "throughputt: unknown key; did you mean 'throughput'?"),
        (["deepspeed.activation_checkpointing.profile=true"], "deepspeed.activation_checkpointing: unknown key"),
        (["checkpoint.dir=~/runs"], 'checkpoint.dir: "~/runs" begins with ~, which only a shell replaces'),
        (["data.train.0.path=~/x"], 'data.train.0.path: "~/x" begins with ~'),
    ],
)
def test_fields_that_disagree_are_named_with_both_numbers(file: Path, overrides: list[str], words: str) -> None:
    assert words in refusal(file, *overrides)


def test_all_problems_come_in_one_message(file: Path) -> None:
    message = refusal(file, "parallel.pipeline=3", "model.num_query_groups=3", "deepspeed.fp16.enabled=true")
    first, *lines = message.splitlines()
    assert first == f"{file}: 3 problems"
    assert [line.split(":")[0].strip() for line in lines] == [
        "model.num_query_groups",
        "model.num_layers",
        "deepspeed.fp16",
    ]


@pytest.mark.parametrize("override", ["optimizer.name=adafactor", "quantization.embeddings=true"])
@pytest.mark.parametrize("method", ["none", "bitnet"])
def test_what_needs_low_bit_weights_is_refused_without_them(file: Path, override: str, method: str) -> None:
    message = refusal(file, f"quantization.method={method}", override)
    assert override.split("=")[0] in message and method in message and "dqt" in message
    load_config(file, [override])  # with method dqt it is fine


@pytest.mark.parametrize("zero", ['"one"', "null", "[]", '{"stage": "one"}', '{"stage": 4}'])
def test_a_zero_section_that_is_not_valid_does_not_stop_the_other_checks(file: Path, zero: str) -> None:
    """The check of CUDA graphs reads ZeRO's stage too, before the stage itself is judged."""
    wrong = refusal(file, f"deepspeed.zero_optimization={zero}", "training.cuda_graph=true", "parallel.context=2")
    assert [line.split(":")[0].strip() for line in wrong.splitlines()[1:]] == [
        "parallel.context",
        "deepspeed.zero_optimization.stage" if "stage" in zero else "deepspeed.zero_optimization",
    ]


# ---- against the number of processes ----


def test_world_that_cannot_be_split_is_refused(file: Path) -> None:
    message = world_refusal(file, 6, "parallel.tensor=2", "parallel.pipeline=2")
    assert (
        "6 process(es) cannot be split into copies of tensor * pipeline = 2 * 2 = 4; start 4 or 8 processes" in message
    )


def test_batch_that_does_not_fit_prints_the_equation(file: Path) -> None:
    message = world_refusal(file, 3)
    assert (
        "training.global_batch_size: 8 is not a multiple of data parallel size 3 * micro_batch_size 2 = 6; "
        "nearest: 6 or 12" in message
    )


def test_interleaved_schedule_wants_micro_batches_in_groups_of_the_pipeline(file: Path) -> None:
    overrides = ["parallel.pipeline=2", "training.global_batch_size=6"]
    check_world(load_config(file, overrides), 2)  # control: the plain schedule takes 3 micro-batches
    message = world_refusal(file, 2, *overrides, "parallel.virtual_pipeline=2")
    assert "= 3 micro-batches is not a multiple of parallel.pipeline = 2" in message and "nearest: 4 or 8" in message


def test_process_grid_counts(file: Path) -> None:
    config = load_config(file, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"])
    assert process_grid(config, 8) == ProcessGrid(
        tensor=2, pipeline=2, data=2, virtual_pipeline=2, num_microbatches=2, world_size=8
    )
