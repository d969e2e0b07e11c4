"""A run that is killed and resumed, in the same or another ZeRO stage, ends with the bits of an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dqt_dist.checkpoint.folder import step_of
from tests import forked
from tests.training.conftest import ROOT, Train, command, environment

DP_2 = ("checkpoint.keep_last=99", "checkpoint.interval=10", "logging.interval=10", "data.document_masking=true")


def zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


def digests(path: Path) -> dict[str, str]:
    """The output of tools/inspect_ckpt.py --digest: one digest per part, and the total on the last line."""
    done = forked.run([ROOT / "tools/inspect_ckpt.py", path, "--digest"])
    assert done.returncode == 0, done.stderr
    *parts, total = done.stdout.splitlines()
    return dict(line.split() for line in parts) | {"total": total}


def killed_after_step_10(config_file: Path, folder: Path, stage: int) -> Path:
    """The checkpoint of step 10 of a run whose processes all got SIGKILL some steps later."""
    settings = (*DP_2, zero(stage), "training.steps=4000", f"checkpoint.dir={folder}")
    saved = folder / "checkpoints" / "step_00000010"
    process = subprocess.Popen(
        command(config_file, *settings, processes=2),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not saved.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        for pid in (process.pid, *map(int, children)):  # torchrun first, or it would report the others
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert len(children) == 2
    return saved


@pytest.mark.slow
def test_twenty_steps_equal_ten_a_kill_and_ten_more_at_any_stage(
    config_file: Path, train: Train, tmp_path: Path
) -> None:
    """Two data-parallel ranks, documents masked. Codes, scales, moments, high-precision parameters, step and data
    position."""
    through = tmp_path / "through"
    settings = (*DP_2, "training.steps=20")
    assert train(*settings, zero(0), f"checkpoint.dir={through}", processes=2).returncode == 0
    wanted = digests(through)
    assert digests(through / "checkpoints" / "step_00000010") != wanted  # negative control

    saved = killed_after_step_10(config_file, tmp_path / "killed", stage=1)
    assert digests(saved) == digests(through / "checkpoints" / "step_00000010")
    for stage in (1, 3):
        folder = tmp_path / f"resumed_{stage}"
        again = train(*settings, zero(stage), f"checkpoint.dir={folder}", processes=2, resume=str(saved))
        assert again.returncode == 0, again.stderr
        assert digests(folder) == wanted


def test_a_complete_run_goes_on_in_another_folder_with_a_checkpoint_of_its_own(train: Train, tmp_path: Path) -> None:
    """No step is left to make, but the folder of the second run holds all that a run leaves."""
    settings = ("training.steps=2", "training.sample_prompt=null")
    assert train(*settings).returncode == 0
    second = train(*settings, f"checkpoint.dir={tmp_path / 'second'}", resume=str(tmp_path / "run"))
    assert second.returncode == 0, second.stderr
    assert digests(tmp_path / "second") == digests(tmp_path / "run")
    # Control: started again where it is, a complete run saves nothing.
    before = (tmp_path / "second/checkpoints/step_00000002/manifest.json").stat().st_mtime_ns
    assert train(*settings, f"checkpoint.dir={tmp_path / 'second'}").returncode == 0
    assert (tmp_path / "second/checkpoints/step_00000002/manifest.json").stat().st_mtime_ns == before


SPIKES = ("training.spike_deviations=0.5", "training.spike_window=4", "training.sample_prompt=null")
# Losses go up and down around that of a guess.
SPIKES += ("optimizer.learning_rate=1e-5", "optimizer.low_bit_learning_rate=1e-5")


def skipped(run: Path, first: int) -> int:
    """Steps skipped from step `first` on, in metrics.jsonl."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return sum(line["skipped_steps"] for line in lines if "skipped_steps" in line and line["step"] >= first)


@pytest.mark.slow
def test_a_resumed_run_skips_the_same_spikes(train: Train, tmp_path: Path) -> None:
    """The losses before the checkpoint decide about the steps after it. Half a deviation makes many a step a spike."""
    through, resumed, forgot = tmp_path / "run", tmp_path / "resumed", tmp_path / "forgot"
    settings = (*SPIKES, "training.steps=20", "checkpoint.keep_last=99", "logging.interval=1")
    assert train(*settings).returncode == 0
    saved = max(path for path in (through / "checkpoints").iterdir() if path.name < "step_00000011")
    assert skipped(through, step_of(saved) + 1) > 0
    # The resumed run executes each skipped step twice, which changes no bit.
    replay = ("training.replay_suspicious_steps=true", "training.deterministic=true")
    done = train(*settings, *replay, f"checkpoint.dir={resumed}", resume=str(saved))
    assert done.returncode == 0, done.stderr
    said = (done.stdout + done.stderr).count("executed again it gave the same bits on every rank")
    assert said == skipped(through, step_of(saved) + 1)
    assert digests(resumed) == digests(through)
    # Control: a window of another size skips others.
    other = train(*settings, "training.spike_window=40", f"checkpoint.dir={forgot}", resume=str(saved))
    assert other.returncode == 0 and digests(forgot) != digests(through)
