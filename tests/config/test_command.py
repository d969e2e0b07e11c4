"""The command that trains: how a wrong config, world or argument ends it, and what --dry-run prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dqt_dist.errors import EXIT_CODE
from tests.config.files import ROOT
from tests.config.test_shipped import WORLD_SIZES


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
    # Low-bit moments take 8 bytes, those of the other weights 8 too; 4 micro-batches keep gradients in fp32.
    lines = {line.rpartition(" ")[0].strip(): line.rpartition(" ")[2] for line in done.stdout.splitlines()}
    assert (lines["codes"], lines["moments"], lines["gradients"]) == ("0.02", "1.00", "0.50")
    assert "65,536 tokens a step" in done.stdout


def test_dry_run_plans_for_any_number_of_processes(tmp_path: Path) -> None:
    """Without a launcher. A device adds the verdict; WORLD_SIZE alone is no launcher and is refused."""
    config = str(ROOT / "configs" / "1b_ternary.json")
    done = run_pretrain(tmp_path, "--config", config, "--dry-run", "--world-size", "32", "--gpu", "l40s")
    assert (done.returncode, done.stderr) == (0, "")
    assert "32 = tensor 1 * pipeline 1 * data 32, ZeRO stage 1" in done.stdout
    assert "L40S, 48 - 3 GiB" in done.stdout and "does not fit" not in done.stdout
    alone = run_pretrain(tmp_path, "--config", config, "--dry-run", WORLD_SIZE="32")
    assert alone.returncode == EXIT_CODE
    assert "RANK is not set, though WORLD_SIZE = 32 is" in alone.stderr and "--world-size" in alone.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dry-run", "--world-size", "0"), "'0' is not a positive integer"),
        (("--gpus", "8"), "go with --dry-run, --plan or --suggest"),
        (("--plan", "--gpu", "h900"), "--gpu 'h900' is not known; use one of h200, h100"),
        (("--plan", "--gpu", "a100"), "needs fp8 units"),
        (("--dry-run", "--world-size", "3"), "training.global_batch_size: 256 is not a multiple"),
        (("--dry-run", "--check-files"), "tokenizer.model"),
        (("--dry-run", "--world-size", "8", "--rank", "8"), "--rank 8: must be from 0 to 7, as --world-size is 8"),
        (("--plan", "--rank", "0"), "--rank goes with --dry-run"),
        (("--suggest", "--set", "quantization.compute=fp32"), "was not measured on a GPU"),
    ],
)
def test_wrong_questions_end_with_one_message(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = run_pretrain(tmp_path, "--config", str(ROOT / "configs" / "1b_ternary_fp8.json"), *arguments)
    assert (done.returncode, done.stdout) == (EXIT_CODE, "")
    assert words in done.stderr and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_every_shipped_config_dry_runs_and_plans(name: str, tmp_path: Path) -> None:
    """At the largest of its world sizes, without its data."""
    processes = str(max(WORLD_SIZES[name]))
    for look in ("--dry-run", "--plan"):
        config = str(ROOT / "configs" / f"{name}.json")
        done = run_pretrain(tmp_path, "--config", config, look, "--gpus", processes)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"processes       {processes} = ")
        assert ("tokens/s" in done.stdout or "speed: unmeasured" in done.stdout) == (look == "--plan")


def test_plan_and_suggest_answer_without_torch(tmp_path: Path) -> None:
    """A module named torch that cannot be imported stands in the way."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    config = str(ROOT / "configs" / "1b_ternary.json")
    for look in ("--plan", "--suggest"):
        done = run_pretrain(tmp_path, "--config", config, look, "--gpus", "8", PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        assert "8 H100" in done.stdout
