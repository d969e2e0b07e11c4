"""The README is correct: the paths in it exist, its commands run, the demo command trains."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_path_it_names_exists() -> None:
    """Paths in code spans and indented blocks that begin with a folder of the repository."""
    folders = ("dqt_dist", "configs", "launchers", "tools", "tests", "benchmarks", "docs")
    named = set(re.findall(rf"\b((?:{'|'.join(folders)})/[\w./-]+\w)", README))
    assert len(named) > 15
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert missing == []


def test_every_config_is_in_its_table() -> None:
    for config in (ROOT / "configs").glob("*.json"):
        assert f"`{config.stem}`" in README, config.stem


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in README and "make test" in (ROOT / ".ci/run").read_text()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"setup", "demo", "test", "lint"} <= set(targets)


@pytest.mark.parametrize("command", ["launchers/pretrain.py", "tools/prepare_data.py", "benchmarks/layout_parity.py"])
def test_help_teaches_with_an_example(command: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / command), "--help"], capture_output=True, text=True, check=True)
    assert command in done.stdout.split("usage:")[1].split("\n", 1)[1]


@pytest.mark.slow
def test_the_demo_command_trains_over_four_processes(tmp_path: Path) -> None:
    """The script of `make demo` with 8 steps: text from this Python, launcher of deepspeed, TP 2 x PP 2, report."""
    run = tmp_path / "run"
    settings = ["training.steps=8", "optimizer.warmup_steps=2", "training.eval_interval=0", "training.eval_batches=1"]
    settings += ["training.sample_tokens=4", f"checkpoint.dir={run}"]
    command = [str(ROOT / "tools/demo.sh"), *(part for setting in settings for part in ("--set", setting))]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["layout"]["tensor"] == summary["layout"]["pipeline"] == 2
    assert summary["last_loss"] < summary["first_loss"]
    assert "bytes a low-bit weight" in done.stdout and "what it writes" in done.stdout
