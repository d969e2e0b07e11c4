"""The JSON config: what loads, what is refused and in which words, and that a complete config comes back equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dqt_dist.config import Config, ProcessGrid, check_world, load_config, process_grid, to_json
from dqt_dist.errors import EXIT_CODE, UserError

ROOT = Path(__file__).resolve().parents[1]
WORLD_SIZES = {
    "demo_cpu": (4, 8),
    "130m_ternary": (1, 2, 4),
    "320m_ternary": (1, 8),
    "1b_ternary": (1, 8, 32),
    "1b_ternary_fp8": (1, 8, 32),
    "1b_int8": (1, 8),
    "1b_bf16": (1, 8),
    "1b_bitnet": (1, 8),
}
"""Process counts at which each shipped config must fit."""


def small() -> dict[str, Any]:
    """The least a config says: every field without a default."""
    return {
        "model": {
            "num_layers": 4,
            "hidden_size": 128,
            "ffn_hidden_size": 384,
            "num_attention_heads": 4,
            "vocab_size": 2048,
            "seq_length": 128,
        },
        "optimizer": {"learning_rate": 0.003},
        "data": {"train": [{"path": "data/a"}], "tokenizer": "data/tokenizer.model"},
        "training": {"steps": 100, "micro_batch_size": 2, "global_batch_size": 8},
        "checkpoint": {"dir": "runs/x"},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(small()))
    return path


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    return str(caught.value)


def world_refusal(file: Path, world_size: int, *overrides: str) -> str:
    config = load_config(file, overrides)
    with pytest.raises(UserError) as caught:
        check_world(config, world_size)
    return str(caught.value)


# ---- what loads ----


def test_every_shipped_config_has_a_stated_world_size() -> None:
    assert sorted(path.stem for path in (ROOT / "configs").glob("*.json")) == sorted(WORLD_SIZES)


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_shipped_config_fits_and_comes_back_equal(name: str, tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / f"{name}.json")
    for world_size in WORLD_SIZES[name]:
        arrangement = process_grid(config, world_size)
        assert arrangement.tensor * arrangement.pipeline * arrangement.data == world_size
    copy = tmp_path / "config.json"
    copy.write_text(to_json(config))
    assert load_config(copy) == config


def test_shipped_1b_configs_differ_in_the_method_alone() -> None:
    """The baselines are comparable: same model, data and batch; only quantization, learning rates and folder differ."""
    texts = []
    for name in ("1b_ternary", "1b_int8", "1b_bf16", "1b_bitnet"):
        values = json.loads((ROOT / "configs" / f"{name}.json").read_text())
        for section, key in (
            ("optimizer", "learning_rate"),
            ("optimizer", "low_bit_learning_rate"),
            ("checkpoint", "dir"),
        ):
            values[section].pop(key, None)
        values.pop("quantization")
        texts.append(values)
    assert all(values == texts[0] for values in texts)


def test_defaults_are_resolved_and_written(file: Path) -> None:
    config = load_config(file)
    assert config.model.num_query_groups == 4
    assert (config.quantization.activation, config.quantization.scale_rule) == ("int8", "absmean")
    assert config.quantization.scale_sigmas == 3.0
    assert (config.optimizer.low_bit_learning_rate, config.optimizer.beta1) == (0.003, 0.9)
    assert config.zero_stage == 0
    assert json.loads(to_json(config))["model"]["num_query_groups"] == 4


@pytest.mark.parametrize(
    ("overrides", "path", "expected"),
    [
        (["quantization.bits=4"], "quantization.scale_rule", "sigma"),
        (["quantization.bits=4"], "quantization.scale_sigmas", 3.0),
        (["quantization.bits=5"], "quantization.scale_sigmas", 6.0),
        (["quantization.method=none"], "quantization.activation", "none"),
        (["quantization.method=bitnet"], "quantization.activation", "int8"),
        (["optimizer.name=adafactor"], "optimizer.beta1", None),
        (["optimizer.name=adafactor", "optimizer.beta1=0.5"], "optimizer.beta1", 0.5),
        (["optimizer.beta1=null"], "optimizer.beta1", 0.9),
        (["optimizer.schedule=wsd"], "optimizer.decay_steps", 10),
        (["optimizer.schedule=wsd", "training.steps=3"], "optimizer.decay_steps", 1),
        (["model.num_query_groups=null"], "model.num_query_groups", 4),
    ],
)
def test_a_default_follows_from_other_fields(file: Path, overrides: list[str], path: str, expected: object) -> None:
    section, field = path.split(".")
    assert getattr(getattr(load_config(file, overrides), section), field) == expected


def test_process_grid_counts(file: Path) -> None:
    config = load_config(file, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"])
    assert process_grid(config, 8) == ProcessGrid(
        tensor=2, pipeline=2, data=2, virtual_pipeline=2, num_microbatches=2, world_size=8
    )


@pytest.mark.parametrize("rule", ["absmean", "sigma", "absmax", "paper"])
def test_every_scale_rule_goes_with_ternary(file: Path, rule: str) -> None:
    assert load_config(file, [f"quantization.scale_rule={rule}"]).quantization.scale_rule == rule


# ---- overrides ----


def test_overrides_reach_every_depth(file: Path) -> None:
    config = load_config(
        file,
        [
            "training.steps=7",
            "quantization.bits=8",
            "quantization.compute=fp32",
            "training.sample_prompt=Return the = sign",
            "data.train.0.path=other/prefix",
            'data.valid=[{"path": "v", "weight": 2}]',
            "deepspeed.zero_optimization.stage=1",
            "parallel.sequence=false",
        ],
    )
    assert (config.training.steps, config.quantization.bits, config.quantization.compute) == (7, 8, "fp32")
    assert config.training.sample_prompt == "Return the = sign"
    assert config.data.train[0].path == "other/prefix"
    assert config.data.valid is not None and config.data.valid[0].weight == 2.0
    assert config.zero_stage == 1 and config.deepspeed == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps", "is not of the form section.key=value"),
        ("steps=3", "is not of the form section.key=value"),
        ("data.train.1.path=x", "data.train.1.path: data.train is a list of 1 and has no element '1'"),
        ("training.steps.x=1", "training.steps.x: training.steps is 100 and has no key 'x'"),
        ("training.stepz=1", "training.stepz: unknown key; did you mean 'steps'?"),
        ("trainig.steps=1", "trainig: unknown key; did you mean 'training'?"),
        ("data.train.0.wieght=1", "data.train.0.wieght: unknown key; did you mean 'weight'?"),
        ("model.qqq=1", "model.qqq: unknown key; known here: num_layers, hidden_size"),
    ],
)
def test_override_that_cannot_be_written_is_refused(file: Path, override: str, words: str) -> None:
    assert words in refusal(file, override)


# ---- the file itself ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        ("[]", "holds a JSON list"),
        ('{"model": {}, "model": {}}', "the key 'model' stands twice"),
    ],
)
def test_file_that_is_no_config_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ") and words in message


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file or directory" in refusal(tmp_path / "absent.json")


def test_missing_field_is_named(tmp_path: Path) -> None:
    values = small()
    del values["training"]["steps"], values["checkpoint"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    message = refusal(path)
    assert "training.steps: required, but not given" in message
    assert "checkpoint: required, but not given" in message


# ---- one field ----


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('training.steps="12"', 'training.steps: "12" is not valid; should be a valid integer'),
        ("training.steps=1.5", "training.steps: 1.5 is not valid; should be a valid integer"),
        ("training.steps=0", "training.steps: 0 is not valid; should be greater than 0"),
        ("training.steps=true", "training.steps: true is not valid; should be a valid integer"),
        ("training.seed=4294967296", "training.seed: 4294967296 is not valid; should be less than 4294967296"),
        ("parallel.sequence=1", "parallel.sequence: 1 is not valid; should be a valid boolean"),
        (
            "parallel.virtual_pipeline=1",
            "parallel.virtual_pipeline: 1 is not valid; should be greater than or equal to 2",
        ),
        ("quantization.bits=9", "quantization.bits: 9 is not valid; should be 'ternary', 2, 3, 4, 5, 6, 7 or 8"),
        (
            "quantization.compute=fp7",
            "quantization.compute: \"fp7\" is not valid; should be 'fp32', 'bf16', 'fp8' or 'int8'",
        ),
        ("optimizer.learning_rate=NaN", "optimizer.learning_rate: NaN is not valid; should be a finite number"),
        ("data.train=[]", "data.train: [] is not valid; list should have at least 1 item"),
        ("data.train.0.weight=-1", "data.train.0.weight: -1 is not valid; should be greater than 0"),
    ],
)
def test_wrong_value_is_named_with_what_would_be_right(file: Path, override: str, words: str) -> None:
    message = refusal(file, override)
    assert words in message
    assert "pydantic" not in message and "http" not in message


def test_a_field_that_others_follow_from_is_reported_once(file: Path) -> None:
    """num_query_groups follows from the heads; a wrong head count must not also be blamed on the field that follows."""
    assert refusal(file, "model.num_attention_heads=x").count("\n") == 0


# ---- fields against each other ----


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
            "model.ffn_hidden_size: 300 is not divisible by 4 * parallel.tensor = 8; a packed byte and a "
            "Philox draw hold 4 codes",
        ),
        (
            ["parallel.tensor=4", "model.hidden_size=136"],
            "model.hidden_size: 136 is not divisible by 4 * parallel.tensor = 16",
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
            "model.ffn_hidden_size: 168 gives 168 features a rank, which fp8 products need in multiples of 16; nearest: 160 or 176",
        ),
        (
            ["quantization.compute=fp8", "quantization.embeddings=true", "model.vocab_size=1000"],
            "model.vocab_size: 1000 gives 1000 features a rank, which fp8 products need in multiples of 16; nearest: 992 or 1008",
        ),
        (
            ["optimizer.state_bits=8", "model.ffn_hidden_size=168"],
            "model.ffn_hidden_size: 168 is not divisible by 32 * parallel.tensor = 32, as optimizer.state_bits = 8 needs",
        ),
        (
            ["optimizer.name=adafactor", "optimizer.state_bits=8"],
            'optimizer.state_bits: 8 is for optimizer.name = "adamw"; use 32',
        ),
        (
            ["optimizer.fused_backward=true"],
            "optimizer.max_grad_norm is 1; use 0, or fused_backward = false",
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
            ["training.cuda_graph=true", "parallel.tensor=2"],
            "training.cuda_graph: true records the work of one rank, but parallel.tensor = 2 makes ranks exchange activations",
        ),
        (
            ["training.cuda_graph=true", "deepspeed.zero_optimization.stage=2"],
            "training.cuda_graph: true needs gradients and weights that stay where they are, but ZeRO stage 2 moves them",
        ),
        (
            ["training.cuda_graph=true", "optimizer.fused_backward=true", "optimizer.max_grad_norm=0"],
            "training.cuda_graph: true does not go with optimizer.fused_backward = true",
        ),
        (
            ["training.cuda_graph=true", "optimizer.gradient_reduction=micro_batch"],
            'training.cuda_graph: true does not go with optimizer.gradient_reduction = "micro_batch"',
        ),
        (
            ["training.cuda_graph=true", "training.recompute=full"],
            'training.cuda_graph: true does not go with training.recompute = "full"',
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


def test_config_is_frozen(file: Path) -> None:
    config = load_config(file)
    assert isinstance(config, Config)
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


# ---- the command ----


def run_pretrain(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """launchers/pretrain.py by its path, from a folder that is not the repository, without its parent's launcher."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), *arguments]
    return subprocess.run(
        command, cwd=tmp_path, env=environment | variables, capture_output=True, text=True, timeout=60
    )


def test_wrong_config_ends_with_exit_code_2_and_one_message(file: Path, tmp_path: Path) -> None:
    done = run_pretrain(tmp_path, "--config", file.name, "--set", "parallel.pipeline=3")
    assert done.returncode == EXIT_CODE == 2
    assert done.stdout == ""
    assert (
        done.stderr
        == "error: config.json: model.num_layers: 4 is not divisible by parallel.pipeline = 3; nearest: 3 or 6\n"
    )


def test_wrong_world_is_printed_by_rank_0_alone(file: Path, tmp_path: Path) -> None:
    shared = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    first = run_pretrain(tmp_path, "--config", file.name, RANK="0", LOCAL_RANK="0", **shared)
    second = run_pretrain(tmp_path, "--config", file.name, RANK="1", LOCAL_RANK="1", **shared)
    assert (first.returncode, second.returncode) == (EXIT_CODE, EXIT_CODE)
    assert first.stderr.count("error: ") == 1 and "Traceback" not in first.stderr
    assert (second.stdout, second.stderr) == ("", "")


def test_wrong_argument_ends_with_exit_code_2(tmp_path: Path) -> None:
    done = run_pretrain(tmp_path, "--config", "x.json", "--stes=3")
    assert done.returncode == EXIT_CODE
    assert done.stderr == "error: command line: unrecognized arguments: --stes=3; --help explains\n"


def test_dry_run_prints_the_plan(tmp_path: Path) -> None:
    """12 layers of 4 * 768^2 + 3 * 768 * 2048 weights at 2 bits; 2 * 32000 * 768 and 25 norms of 768 beside them."""
    done = run_pretrain(tmp_path, "--config", str(ROOT / "configs" / "130m_ternary.json"), "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "84,934,656 weights in linears as 2-bit codes, 49,171,200 in embedding, head and norms" in done.stdout
    assert "low-bit       weights 0.02, gradients 0.32, masters 0.00, moments 0.63 GiB" in done.stdout
    assert "65,536 tokens a step" in done.stdout


@pytest.mark.parametrize("override", ["optimizer.name=adafactor", "quantization.embeddings=true"])
@pytest.mark.parametrize("method", ["none", "bitnet"])
def test_what_needs_low_bit_weights_is_refused_without_them(file: Path, override: str, method: str) -> None:
    message = refusal(file, f"quantization.method={method}", override)
    assert override.split("=")[0] in message and method in message and "dqt" in message
    load_config(file, [override])  # with method dqt it is fine
