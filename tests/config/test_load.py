"""From file and overrides to a complete config: what is read, what is refused in which words, which defaults follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dqt_dist.config import load_config, to_json
from tests.config.files import refusal, small

# ---- defaults ----


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
        (["optimizer.name=adafactor"], "optimizer.low_bit_beta1", None),
        (["optimizer.name=adafactor", "optimizer.low_bit_beta1=0.5"], "optimizer.low_bit_beta1", 0.5),
        (["optimizer.low_bit_beta1=null", "optimizer.beta1=0.8"], "optimizer.low_bit_beta1", 0.8),
        (["optimizer.schedule=wsd"], "optimizer.decay_steps", 10),
        (["optimizer.schedule=wsd", "training.steps=3"], "optimizer.decay_steps", 1),
        (["model.num_query_groups=null"], "model.num_query_groups", 4),
    ],
)
def test_a_default_follows_from_other_fields(file: Path, overrides: list[str], path: str, expected: object) -> None:
    section, field = path.split(".")
    assert getattr(getattr(load_config(file, overrides), section), field) == expected


# ---- configs that come with the program ----


def test_a_config_of_the_program_is_found_from_any_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As configs/NAME.json, unless the working folder has one of its own; under no other name."""
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/1b_ternary.json").checkpoint.dir == "runs/1b_ternary"
    for other in ("1b_ternary.json", "other/1b_ternary.json", "configs/nope.json"):
        assert refusal(other).startswith(f"{other}: cannot be read: No such file or directory; ")
    (tmp_path / "configs").mkdir()
    file.rename(tmp_path / "configs/1b_ternary.json")
    assert load_config("configs/1b_ternary.json").model.num_layers == 4


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
