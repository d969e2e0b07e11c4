"""A run whose codes move as in no run that learned warns once, with numbers. Runs that learned do not warn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dqt_dist.optim.schedule import StepRates, step_rates
from dqt_dist.training.health import unhealthy
from tests.small import small_config
from tests.training.conftest import ROOT, Train

STUDY = sorted((ROOT / "docs/benchmarks/quality").glob("S_*.json"))
# The clamped share is 0.70 after the warm-up, and the loss is behind that of every other ternary run.
TOO_FAST = "S_dqt_ternary_beta1_0.995_3e-3_1526steps"
DQT = [path for path in STUDY if "flip_rate" in json.loads(path.read_text())["train"]]


def said(metrics: dict[str, float], rate: float, *overrides: str) -> list[str]:
    config = small_config(*overrides, f"optimizer.low_bit_learning_rate={rate}", "training.steps=1000")
    return unhealthy(metrics, StepRates(500, 0.0, rate), config)


@pytest.mark.parametrize("path", DQT, ids=lambda path: path.stem)
def test_runs_of_the_study_that_learned_are_healthy(path: Path) -> None:
    """Control: the run that was too fast is not."""
    run = json.loads(path.read_text())
    total, curves = run["planned_tokens"] // run["tokens_per_step"], run["train"]
    steps = (f"training.steps={total}", "optimizer.schedule=cosine", f"optimizer.warmup_steps={total // 20}")
    config = small_config(*run["settings"], *steps)
    assert len(curves["tokens"]) > 20
    found: list[str] = []
    for tokens, flips, saturation in zip(curves["tokens"], curves["flip_rate"], curves["saturation"], strict=True):
        rates = step_rates(tokens // run["tokens_per_step"], config)
        found += unhealthy({"flip_rate": flips, "saturation": saturation}, rates, config)
    assert bool(found) == (path.stem == TOO_FAST), found


def test_each_figure_has_its_line() -> None:
    eight = ("quantization.bits=8",)
    assert said({"flip_rate": 0.16, "saturation": 0.001}, 1e-3, *eight) == []
    (line,) = said({"flip_rate": 0.9, "saturation": 0.001}, 1e-3, *eight)
    assert "flip_rate 0.9 is above 0.64" in line and "lower optimizer.low_bit_learning_rate, which is 0.001" in line
    (line,) = said({"flip_rate": 0.0, "saturation": 0.0}, 1e-3, *eight)
    assert "flip_rate 0 is below 0.011" in line and "raise optimizer.low_bit_learning_rate" in line
    (line,) = said({"flip_rate": 0.0, "saturation": 0.0}, 1e-3, *eight, "quantization.rounding=nearest")
    assert 'use quantization.rounding = "stochastic"' in line
    (line,) = said({"flip_rate": 0.16, "saturation": 0.3}, 1e-3, *eight)
    assert "saturation 0.3 is above 0.2" in line and "quantization.scale_sigmas" in line
    (line,) = said({"flip_rate": 0.005, "saturation": 0.3}, 2e-3, "quantization.latent_bits=6")
    assert "quantization.latent_sigmas" in line
    assert said({"flip_rate": 0.005, "saturation": 0.37}, 1e-3) == []  # ternary


def test_nothing_is_said_of_the_first_steps() -> None:
    config = small_config("training.steps=1000", "optimizer.warmup_steps=50")
    figures = {"flip_rate": 1.0, "saturation": 1.0}
    assert unhealthy(figures, step_rates(50, config), config) == []
    assert len(unhealthy(figures, step_rates(51, config), config)) == 2


@pytest.mark.parametrize(("rate", "warnings"), [(1.0, 1), (1e-3, 0)])
def test_a_run_at_a_huge_rate_warns_at_one_step_and_one_at_a_usual_rate_does_not(
    train: Train, rate: float, warnings: int
) -> None:
    settings = ("training.steps=26", "optimizer.learning_rate=1e-3", "training.sample_prompt=null")
    done = train(*settings, f"optimizer.low_bit_learning_rate={rate}", "checkpoint.interval=0")
    said = [line for line in (done.stdout + done.stderr).splitlines() if "docs/tuning.md" in line]
    assert len({line.split("flip_rate")[0] for line in said if "flip_rate" in line}) == warnings, done.stdout
    assert all("warning: step 22: " in line for line in said)
    if warnings:
        assert "lower optimizer.low_bit_learning_rate, which is 1 in this step" in said[0]
