"""The command that trains: how a wrong config, world or argument ends it, and what --dry-run prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dqt_dist.errors import EXIT_CODE
from tests.config.files import ROOT


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
