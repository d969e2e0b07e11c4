"""Processes that fail: killed, stopped, signalled, diverging; disks that refuse, checkpoints that are damaged.

The tables in docs/reliability.md name these tests. Each test waits for an event; DEADLINE_SECONDS only bounds how
long a fault of ours can hold up the suite.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dqt_dist.checkpoint.digest import digest_of
from dqt_dist.checkpoint.folder import complete_checkpoints, resolve
from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.errors import EXIT_CODE, RUN_ERROR_EXIT_CODE, STOPPED_EXIT_CODE
from tests import forked
from tests.checkpoint.damage import flip, plant
from tests.soak import STAGES, Soak
from tests.training.conftest import ROOT, Train, environment, pretrain
from tests.training.ranks import DEADLINE_SECONDS, Ranks, steps_logged

ENDLESS = ("training.steps=100000", "logging.interval=1", "checkpoint.interval=0")


def checkpoints(run: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(run / "checkpoints")]


# ---- killed and stopped ----


@pytest.mark.slow
@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.soak)])
def test_a_run_killed_at_random_moments_ends_in_the_bits_of_one_that_was_not(tmp_path: Path, kills: int) -> None:
    """Rank 0, rank 1 or both, at random moments, and each start at another ZeRO stage. Samples, losses and bits are
    those of the run that goes through; where a rank is left, one message names the other."""
    soak = Soak(tmp_path, steps=21 + 2 * kills, restarts=kills, draw=random.Random(20261126), interval=3)
    soak.prepare()
    soak.through("through", STAGES[0])
    events = soak.interrupted("killed", STAGES, [signal.SIGKILL])
    assert len(events) == kills and set(events) == {f"SIGKILL to rank {who}" for who in ("0", "1", "0, 1")}
    soak.check("killed", "through", bits=True)
    ends = complete_checkpoints(tmp_path / "killed" / "checkpoints")[-2:]
    assert digest_of(CheckpointReader(ends[0])) != digest_of(CheckpointReader(ends[1]))  # negative control


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_stands_still_is_named(config_file: Path, tmp_path: Path, stopped: int) -> None:
    """SIGSTOP. Rank 0 also keeps the store through which ranks hear of each other."""
    run, other = tmp_path / "run", 1 - stopped
    with Ranks(config_file, tmp_path / "logs", *ENDLESS, "training.step_timeout_seconds=2") as ranks:
        ranks.wait_until(lambda: 3 in steps_logged(run))
        ranks.signal(stopped, signal.SIGSTOP)
        assert ranks.exit_code(other) == 1, ranks.output()
        message = ranks.logs[other].read_text()
        assert message.count(f"error: no answer from rank {stopped}") == 1
        assert "2 s, training.step_timeout_seconds" in message
        assert "in train_step" in (run / "stacks" / f"rank_{other}.txt").read_text()


def test_a_port_that_another_program_has_is_one_message(train: Train) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = train(**variables)
    assert done.returncode == RUN_ERROR_EXIT_CODE and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count(f"error: 127.0.0.1:{port}: the ranks cannot meet there: ") == 1, done.stderr
    assert "EADDRINUSE" in done.stderr


# ---- asked to stop ----


@pytest.mark.parametrize(
    ("moment", "number", "rank"),
    [
        ("start-up", signal.SIGTERM, 1),
        ("first step", signal.SIGUSR1, 0),
        ("validation", signal.SIGTERM, 1),
        ("save", signal.SIGUSR1, 1),
    ],
)
def test_a_signal_at_any_moment_saves_and_stops_all(
    config_file: Path, tmp_path: Path, moment: str, number: signal.Signals, rank: int
) -> None:
    """Both ranks end with exit code 75, and the same command goes on from the step that was running."""
    run = tmp_path / "run"
    settings = {
        "start-up": [],
        "first step": [],
        "validation": ["training.eval_interval=3", "training.eval_batches=1000"],
        "save": ["checkpoint.interval=3"],
    }[moment]
    comes = {
        "start-up": lambda: (run / "data_index").exists(),
        "first step": lambda: (run / "config.json").exists(),
        "validation": lambda: 3 in steps_logged(run),
        "save": lambda: list((run / "checkpoints").glob(".partial_step_00000003")) != [],
    }[moment]
    with Ranks(config_file, tmp_path / "logs", *ENDLESS, *settings) as ranks:
        ranks.wait_until(comes)
        ranks.signal(rank, number)
        assert ranks.exit_codes() == [STOPPED_EXIT_CODE] * 2, ranks.output()
        assert ranks.output().count("stopped by a signal") == 1
    if moment == "validation":
        assert checkpoints(run) == ["step_00000003"]
        # The validation that the signal ended is made up for.
        again = [*ENDLESS, "training.steps=4", "training.eval_interval=3"]
        with Ranks(config_file, tmp_path / "logs_again", *again) as ranks:
            assert ranks.exit_codes() == [0, 0], ranks.output()
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "valid_loss" in line] == [3, 4]
    elif moment == "save":
        assert checkpoints(run)[0] == "step_00000003"
    else:  # nothing to save, or the step after which the signal was seen
        assert len(checkpoints(run)) <= 1
        assert not list(run.glob("checkpoints/.partial*"))


def test_a_signal_ends_a_rank_that_waits_for_one_that_never_starts(config_file: Path, tmp_path: Path) -> None:
    """Inside torch, where it would wait for the timeout of the start-up."""
    variables, log = forked.ranks_environment(2)[0], tmp_path / "log"

    def waits() -> bool:
        with socket.socket() as other:
            return other.connect_ex(("127.0.0.1", int(variables["MASTER_PORT"]))) == 0

    rank = forked.start(pretrain(config_file), environment() | variables, log, log)
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not waits():
            assert rank.is_alive() and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        assert rank.pid is not None
        os.kill(rank.pid, signal.SIGTERM)
        rank.join(DEADLINE_SECONDS)
        assert rank.exitcode == STOPPED_EXIT_CODE
        assert log.read_text().count("stopped by a signal before the ranks had met; there was nothing to save") == 1
    finally:
        rank.kill()


def test_ranks_do_not_outlive_the_deepspeed_launcher(config_file: Path, tmp_path: Path) -> None:
    """SIGTERM ends `deepspeed` and reaches neither the process that it started nor the ranks: they save and end."""
    run = tmp_path / "run"
    settings = [part for override in ENDLESS for part in ("--set", override)]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", "29731"]
    command = [*launcher, str(ROOT / "launchers/pretrain.py"), "--config", str(config_file), *settings]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    below: list[psutil.Process] = []
    try:
        while 2 not in steps_logged(run):
            assert process.poll() is None
            time.sleep(0.05)
        below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(DEADLINE_SECONDS) == -signal.SIGTERM
        _, left = psutil.wait_procs(below, timeout=DEADLINE_SECONDS)
        assert left == []
    finally:
        process.kill()
        for rank in below:
            if rank.is_running():
                rank.kill()
    assert len(checkpoints(run)) == 1
    assert "stopped by a signal after step" in (tmp_path / "log").read_text()


# ---- numbers that are not finite ----


def test_a_run_that_diverged_says_so(train: Train, tmp_path: Path) -> None:
    """Every loss is finite, and far above that of a guess, ln(512) = 6.238."""
    rates = ("optimizer.learning_rate=100", "optimizer.low_bit_learning_rate=100")
    done = train(*rates, "training.steps=4", "training.sample_prompt=null")
    assert done.returncode == 1, done.stderr
    assert "the run diverged: its validation loss of" in done.stdout and "6.238 nats per token" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["diverged"] and summary["valid_loss"] > 100 and summary["skipped_steps"] == 0


def test_a_run_without_finite_losses_stops_and_saves_nothing(train: Train, tmp_path: Path) -> None:
    """A learning rate of 1e30 after a first checkpoint. logging.interval plays no part."""
    assert train("training.steps=2").returncode == 0
    again = ("optimizer.learning_rate=1e30", "training.steps=40", "training.max_skipped_steps=6")
    done = train(*again, "logging.interval=1000", "checkpoint.interval=2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("error: training.max_skipped_steps: 6 steps in a row up to step") == 1
    assert "step_00000002, as before" in done.stderr


# ---- disks and checkpoints ----


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))


def test_a_run_that_cannot_write_ends_with_one_message(train: Train, tmp_path: Path) -> None:
    done = train(prepare=limit_file_size)
    assert done.returncode == RUN_ERROR_EXIT_CODE and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and f"{tmp_path}/run/data_index: " in done.stderr, done.stderr


def test_a_run_passes_over_a_damaged_checkpoint_and_refuses_a_planted_one(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train("training.steps=10")
    assert first.returncode == 0, first.stderr
    flip(resolve(run) / "__0_0.distcp", 5000)
    auto = train("training.steps=6")
    assert auto.returncode == 0, auto.stderr
    said = auto.stdout + auto.stderr
    assert "__0_0.distcp has another content" in said and "; set aside as left_step_00000010" in said
    assert f"resumed from {run}/checkpoints/step_00000005 at step 5" in said

    plant(resolve(run), tmp_path / "executed")
    planted = train("training.steps=12")
    assert planted.returncode == EXIT_CODE, planted.stderr
    assert "error: " in planted.stderr and "names 'posix' 'mkdir'" in planted.stderr
    assert "Traceback" not in planted.stderr and not (tmp_path / "executed").exists()
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-2:] == ["step_00000005", "step_00000006"]
