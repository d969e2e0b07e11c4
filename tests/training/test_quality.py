"""benchmarks/quality.py: a list of runs is trained, goes on where it was stopped, and becomes a page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import quality

ROOT = Path(__file__).resolve().parents[2]
TWO = "none_0.002|dqt8_0.001"
TINY = ["model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=2"]
TINY += ["model.vocab_size=600", "model.seq_length=32", "training.micro_batch_size=4", "training.global_batch_size=4"]
TINY += ["training.eval_interval=2", "training.eval_batches=1", "optimizer.warmup_steps=1", "logging.interval=1"]
TINY += ["quantization.compute=fp32", "data.num_workers=0"]


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, str(ROOT / "benchmarks/quality.py"), *map(str, arguments)]
    return subprocess.run(whole, capture_output=True, text=True, timeout=300, check=False)


def test_the_names_of_the_list_are_distinct_and_every_method_is_in_it() -> None:
    names = [run.name for run in quality.study()]
    assert len(set(names)) == len(names)
    assert {run.method for run in quality.study()} == set(quality.METHODS) == set(quality.NAMES)


@pytest.mark.slow
def test_two_runs_become_a_page(corpus: Path, tmp_path: Path) -> None:
    out, kept, page = tmp_path / "out", tmp_path / "kept", tmp_path / "quality.md"
    overrides = [part for setting in TINY for part in ("--set", setting)]
    arguments = ["run", out, "--data", corpus, "--only", TWO, "--steps", "4", *overrides]
    stopped = command(*arguments, "--seconds", "0")  # no time: nothing is started, and nothing is finished
    assert stopped.returncode == 1 and "runs, 2 of them to do" in stopped.stdout, stopped.stderr
    done = command(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished; validation") == 2
    again = command(*arguments)
    assert again.returncode == 0 and "0 of them to do" in again.stdout
    collected = command("collect", out, "--to", kept, "--commit", "abc", "--device", "CPU", "--date", "2026-11-26")
    assert collected.returncode == 0, collected.stderr
    run = json.loads((kept / "dqt8_0.001.json").read_text())
    assert run["finished"] and run["bytes_are"] == "measured" and len(run["flip_rate"]) == len(run["training"]) == 4
    assert [tokens for tokens, _ in run["valid"]] == [256, 512]
    written = command("page", "--kept", kept, "--page", page)
    assert written.returncode == 0, written.stderr
    text = page.read_text()
    assert "| DQT, 8 bit | 0.001 | 0.003 | 1234 |" in text and "CPU" in text
    assert page.with_suffix(".png").stat().st_size > 10_000
