"""launchers/slurm/submit.py: the command that it makes, and what it refuses. A real submission is in
test_slurm_script.py."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dqt_dist.commands import submit
from dqt_dist.errors import EXIT_CODE
from tests.launchers.slurm_cluster import SlurmCluster, needs_slurm

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ("--config", str(ROOT / "configs/1b_ternary.json"))
SIXTEEN = ("--nodes", "2", "--gpus-per-node", "8")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_command_has_the_size_the_site_and_the_overrides(capsys: pytest.CaptureFixture) -> None:
    site = ("--time", "1-00:00:00", "--partition", "gpu", "--account", "project")
    words = ("--set", "parallel.tensor=2", "--set", "checkpoint.dir=runs/a b")
    assert submit.main([*CONFIG, *SIXTEEN, *site, *words, "--dry-run"]) == 0
    name, *options = shlex.split(capsys.readouterr().out)
    assert name == "sbatch"
    assert options == [
        "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1-00:00:00", "--partition=gpu",
        "--account=project", "launchers/slurm/pretrain.sbatch", CONFIG[1], *words,
    ]  # fmt: skip


def test_what_is_not_given_is_left_to_the_script(capsys: pytest.CaptureFixture) -> None:
    assert submit.main([*CONFIG, *SIXTEEN, "--dry-run"]) == 0
    assert not {"--time", "--partition", "--account"} & {word.split("=")[0] for word in capsys.readouterr().out.split()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*CONFIG, *SIXTEEN, "--set", "parallel.tensor=3"), "parallel.tensor"),
        ((*CONFIG, "--nodes", "3", "--gpus-per-node", "3", "--set", "parallel.tensor=2"), "9 process(es) cannot be"),
        ((*CONFIG, "--nodes", "7", "--gpus-per-node", "1"), "training.global_batch_size"),
        (("--config", "absent.json", *SIXTEEN), "absent.json"),
    ],
    ids=["tensor", "world", "batch", "file"],
)
def test_what_does_not_fit_is_one_message(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture
) -> None:
    assert submit.main([*arguments, "--dry-run"]) == EXIT_CODE
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("submit: ") and words in printed.err


def test_it_starts_in_the_root_of_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert submit.main([*CONFIG, *SIXTEEN, "--dry-run"]) == EXIT_CODE
    assert "launchers/slurm/pretrain.sbatch is not in" in capsys.readouterr().err


def test_without_slurm_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("PATH", "")
    assert submit.main([*CONFIG, *SIXTEEN]) == EXIT_CODE
    assert "sbatch is not found" in capsys.readouterr().err


@needs_slurm
def test_what_sbatch_refuses_is_told_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with SlurmCluster(tmp_path) as cluster:
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, cluster.environment[name])
        assert submit.main([*CONFIG, *SIXTEEN, "--partition", "absent"]) == EXIT_CODE
    assert "invalid partition specified: absent" in capsys.readouterr().err
