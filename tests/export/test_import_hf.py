"""From an export to a checkpoint: it gives the same export again, and training goes on from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dqt_dist.checkpoint import store
from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.config import to_json
from dqt_dist.errors import EXIT_CODE
from dqt_dist.export.weights import Weights
from tests.distributed import run_distributed
from tests.export.conftest import MODEL, NUM_STEPS, Exported, Trained, convert, digests
from tests.export.test_hf import BITNET, EMBEDDINGS, FREE_SCALE, NONE, SUB_NORM, bits
from tests.parallel.runs import start
from tests.small import small_config

EXPORTS: list[tuple[str, str, tuple[str, ...]]] = [
    ("hf-bitnet", "fp32", (FREE_SCALE,)),
    ("hf-bitnet", "bf16", (SUB_NORM,)),
    ("hf-compressed", "bf16", (bits(3),)),
    ("hf-compressed", "fp32", (bits(8), FREE_SCALE)),
    ("hf", "bf16", (FREE_SCALE,)),
    ("hf", "fp32", (EMBEDDINGS,)),
    ("hf", "bf16", (NONE,)),
]


@pytest.mark.parametrize(("export_format", "dtype", "overrides"), EXPORTS, ids=str)
def test_export_import_export_is_byte_identical(
    exported: Exported, tmp_path: Path, export_format: str, dtype: str, overrides: tuple[str, ...]
) -> None:
    first = exported(export_format, *overrides, dtype=dtype)
    assert convert("--from-hf", first, "--output", tmp_path / "run") == 0
    arguments = ("--format", export_format, "--dtype", dtype, "--no-verify")
    assert convert("--checkpoint", tmp_path / "run", "--output", tmp_path / "again", *arguments) == 0
    assert digests(tmp_path / "again") == digests(first)


def test_import_of_fp32_has_the_bits_of_the_checkpoint(trained: Trained, exported: Exported, tmp_path: Path) -> None:
    """All of the model and its progress; only the moments are gone."""
    assert convert("--from-hf", exported("hf-bitnet"), "--output", tmp_path / "run") == 0
    found, wanted = CheckpointReader(tmp_path / "run"), CheckpointReader(trained())
    assert found.tensors.keys() == wanted.tensors.keys() and found.progress == wanted.progress
    for name in wanted.tensors:
        if "exp_avg" in name:
            assert not found.read(name).any() and bool(wanted.read(name).any())
        else:
            assert torch.equal(found.read(name), wanted.read(name)), name


def resume(rank: int, world_size: int, checkpoint: str, *overrides: str) -> tuple[int, float, int]:
    run = start(*overrides)
    progress = store.load(store.opened(Path(checkpoint)), run.model_chunks, run.optimizer, run.config)
    result = run.step(progress.step + 1)
    return progress.step, run.mean_loss(result), run.optimizer.steps_done


def test_training_goes_on_in_another_layout(exported: Exported, tmp_path: Path) -> None:
    assert convert("--from-hf", exported("hf-bitnet"), "--output", tmp_path / "run") == 0
    checkpoint = CheckpointReader(tmp_path / "run").path
    results = run_distributed(resume, 2, str(checkpoint), *MODEL, "parallel.tensor=2")
    step, loss, steps_done = results[0]
    assert (step, steps_done) == (NUM_STEPS, NUM_STEPS + 1) and 3 < loss < 20


# ---- published models ----


def published(folder: Path, max_shard_size: str = "1GB", **settings: Any) -> LlamaForCausalLM:
    """A plain LLaMA as transformers itself saves it."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        max_position_embeddings=16,
        **settings,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def run_config(folder: Path, *overrides: str) -> Path:
    path = folder / "run.json"
    path.write_text(to_json(small_config(*overrides)))
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_a_published_model_is_taken_with_its_weights(tmp_path: Path, tied: bool) -> None:
    model = published(tmp_path / "hf", tie_word_embeddings=tied)
    config = run_config(tmp_path, NONE)
    assert convert("--from-hf", tmp_path / "hf", "--config", config, "--output", tmp_path / "run") == 0
    weights = Weights(CheckpointReader(tmp_path / "run"))
    state = model.state_dict()
    assert weights.reader.progress.step == 0
    for name in [*weights.linears, *weights.parameters]:
        hf_name = f"{name}.weight" if name == "lm_head" else f"model.{name}.weight"
        assert torch.equal(weights.parameter(name), state[hf_name].float()), name


def test_a_published_model_is_quantised_with_the_rule_of_the_run(tmp_path: Path) -> None:
    model = published(tmp_path / "hf")
    config = run_config(tmp_path, bits(4), "quantization.scale_rule=absmax", FREE_SCALE)
    assert convert("--from-hf", tmp_path / "hf", "--config", config, "--output", tmp_path / "run") == 0
    weights = Weights(CheckpointReader(tmp_path / "run"))
    for name in weights.linears:
        wanted = model.state_dict()[f"model.{name}.weight"].float()
        codes, scale = weights.codes(name)
        # absmax: nothing is clipped. Its statistics are taken in steps of 2^-20 of the standard deviation.
        assert float(scale) == pytest.approx(float(wanted.abs().max()) / 7, rel=1e-5)
        assert float((codes * scale - wanted).abs().max()) <= float(scale) * (0.5 + 1e-4)


def test_codes_of_other_bits_are_quantised_again(exported: Exported, trained: Trained, tmp_path: Path) -> None:
    """An 8-bit export as the beginning of a ternary run."""
    folder = exported("hf-compressed", bits(8))
    record = json.loads((folder / "dqt_dist.json").read_text())
    record["config"]["quantization"] |= {"bits": "ternary", "scale_rule": "absmean"}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(record["config"]))
    assert convert("--from-hf", folder, "--config", path, "--output", tmp_path / "run") == 0
    found, wanted = Weights(CheckpointReader(tmp_path / "run")), Weights(CheckpointReader(trained(bits(8))))
    name = "layers.0.mlp.up_proj"
    codes, scale = found.codes(name)
    mean = float(wanted.matrix(name).abs().mean())
    assert mean / 1.42 < float(scale) < mean * 1.42  # rounded to a power of two
    assert torch.equal(codes, (wanted.matrix(name) / scale).round().clamp(-1, 1).to(torch.int8))


# ---- what cannot come back ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: the folder has 'gelu', the run 'silu'"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "architecture Qwen2ForCausalLM; the trainer builds LlamaForCausalLM"),
        ({"vocab_size": 128}, "vocab_size: the folder has 128, the run 64"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}}, "rope_type: the folder has 'llama3'"),
        ({"attention_bias": True}, "attention_bias: the folder has True"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config 'awq' is not read"),
    ],
)
def test_foreign_models_are_refused_by_field(
    tmp_path: Path, capsys: pytest.CaptureFixture, change: dict[str, Any], message: str
) -> None:
    published(tmp_path / "hf")
    config_json = tmp_path / "hf" / "config.json"
    config_json.write_text(json.dumps(json.loads(config_json.read_text()) | change))
    arguments = ("--from-hf", tmp_path / "hf", "--config", run_config(tmp_path), "--output", tmp_path / "run")
    assert convert(*arguments) == EXIT_CODE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".*"))


WRONG: list[tuple[str, Any, str]] = [
    ("hidden_size", "abc", 'hidden_size: "abc" is not valid; should be a valid integer'),
    ("hidden_size", [32], "hidden_size: [32] is not valid; should be a valid integer"),
    ("hidden_size", True, "hidden_size: true is not valid; should be a valid integer"),
    ("hidden_size", None, "hidden_size: null is not valid; should be a valid integer"),
    ("num_attention_heads", 0, "num_attention_heads: 0 is not valid; should be greater than 0"),
    ("num_hidden_layers", -2, "num_hidden_layers: -2 is not valid; should be greater than 0"),
    ("rms_norm_eps", float("inf"), "rms_norm_eps: Infinity is not valid; should be a finite number"),
    ("vocab_size", 10**20, f"vocab_size: {10**20} is not valid; should be a number of at most 64 bits"),
    ("architectures", {}, "architectures: {} is not valid; should be a valid array"),
    ("rope_parameters", {"rope_theta": "1"}, 'rope_parameters.rope_theta: "1" is not valid; should be a valid number'),
    ("quantization_config", {"quant_method": 4}, "quantization_config.quant_method: 4 is not valid; should be a valid"),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG, ids=[f"{field} {value}" for field, value, _ in WRONG])
def test_a_wrong_value_is_named_with_its_file_and_field(
    tmp_path: Path, capsys: pytest.CaptureFixture, field: str, value: Any, message: str
) -> None:
    published(tmp_path / "hf")
    config_json = tmp_path / "hf" / "config.json"
    config_json.write_text(json.dumps(json.loads(config_json.read_text()) | {field: value}))
    arguments = ("--from-hf", tmp_path / "hf", "--config", run_config(tmp_path), "--output", tmp_path / "run")
    assert convert(*arguments) == EXIT_CODE
    assert f"convert_ckpt: {config_json}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: [], "holds a JSON list, expected an object"),
        (lambda index: {}, "weight_map: required, but not given"),
        (lambda index: {"weight_map": {"a": "../a.safetensors"}}, 'weight_map.a: "../a.safetensors" is not valid'),
        (lambda index: {"weight_map": {"a": "a.safetensors"}}, "weight_map names a.safetensors, which is not there"),
        (lambda index: {"weight_map": {**index, "a": min(index.values())}}, "has no such tensor"),
        (lambda index: {"weight_map": {k: v for k, v in index.items() if "norm" not in k}}, "no tensor model."),
    ],
)
def test_the_index_of_several_files_is_held_to_them(
    tmp_path: Path, capsys: pytest.CaptureFixture, change: Any, message: str
) -> None:
    """Also a file that the index does not name is not read."""
    published(tmp_path / "hf", max_shard_size="10KB")
    (tmp_path / "hf" / "other.safetensors").write_bytes(b"not one")
    arguments = ("--from-hf", tmp_path / "hf", "--config", run_config(tmp_path, NONE), "--output")
    assert convert(*arguments, tmp_path / "good") == 0
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps(change(json.loads(index.read_text())["weight_map"])))
    capsys.readouterr()
    assert convert(*arguments, tmp_path / "run") == EXIT_CODE
    assert message in capsys.readouterr().err


def test_codes_beyond_the_bits_of_the_record_are_refused(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Packing would cut their upper bits off in silence."""
    folder = shutil.copytree(exported("hf-compressed", bits(8)), tmp_path / "hf")
    record = json.loads((folder / "dqt_dist.json").read_text())
    record["bits"] = record["config"]["quantization"]["bits"] = 4
    (folder / "dqt_dist.json").write_text(json.dumps(record))
    assert convert("--from-hf", folder, "--output", tmp_path / "run") == EXIT_CODE
    assert "4 bits have -8 to 7" in capsys.readouterr().err


def test_a_foreign_model_needs_a_config_and_floats_of_bitnet_are_gone(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    published(tmp_path / "hf")
    assert convert("--from-hf", tmp_path / "hf", "--output", tmp_path / "run") == EXIT_CODE
    assert "give the configuration of the run by --config" in capsys.readouterr().err
    assert convert("--from-hf", exported("hf-bitnet", BITNET), "--output", tmp_path / "run") == EXIT_CODE
    assert "float masters are gone" in capsys.readouterr().err
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"not one")
    arguments = ("--config", run_config(tmp_path), "--output", tmp_path / "run")
    assert convert("--from-hf", tmp_path / "hf", *arguments) == EXIT_CODE
    assert "not a whole safetensors file" in capsys.readouterr().err
    assert convert("--from-hf", tmp_path, *arguments) == EXIT_CODE
    assert "no config.json there" in capsys.readouterr().err
