"""A tiny corpus for whole runs, prepared once per test session by the real tool, and the commands of a user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests import forked

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 512


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train, valid and tokenizer.model: some chapters of Python's language reference."""
    folder = tmp_path_factory.mktemp("corpus")
    text = "\n\n".join(list(topics.values())[:60])
    (folder / "text.txt").write_text(text)
    tool = [ROOT / "tools/prepare_data.py", "--input", folder / "text.txt", "--output", folder]
    done = forked.run([*tool, "--vocab-size", VOCABULARY, "--valid-fraction", 0.2, "--workers", 1])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def config_file(corpus: Path, tmp_path: Path) -> Path:
    """A config that trains on `corpus` in a second. The run folder is tmp_path / run."""
    from tests.small import VALUES

    values = json.loads(json.dumps(VALUES))
    values["model"] |= {"vocab_size": VOCABULARY, "seq_length": 32}
    values["data"] = {
        "train": [{"path": str(corpus / "train")}],
        "valid": [{"path": str(corpus / "valid")}],
        "tokenizer": str(corpus / "tokenizer.model"),
        "num_workers": 0,
    }
    values["training"] |= {"eval_batches": 2, "sample_prompt": "Sentence", "sample_tokens": 4, "global_batch_size": 8}
    values["logging"] = {"interval": 2, "histogram_interval": 5}
    values["checkpoint"] = {"dir": str(tmp_path / "run"), "interval": 5}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


def pretrain(config_file: Path, *overrides: str) -> list[str]:
    """The script and its arguments."""
    settings = [part for override in overrides for part in ("--set", override)]
    return [str(ROOT / "launchers/pretrain.py"), "--config", str(config_file), *settings]


def command(config_file: Path, *overrides: str, processes: int = 1) -> list[str]:
    """The command of a user: one process without a launcher, several processes under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [*launcher, *pretrain(config_file, *overrides)]


def environment() -> dict[str, str]:
    return os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
    }


Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def train(config_file: Path) -> Train:
    """Returns train(*overrides, processes=1, resume="auto"), which makes a whole run in its own processes (forked.py).

    `encoding` is that of the run's terminal. `prepare` is called in each process first.
    """

    def run(
        *overrides: str,
        processes: int = 1,
        resume: str = "auto",
        encoding: str = "utf-8",
        prepare: Callable[[], object] | None = None,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        return forked.run(
            [*pretrain(config_file, *overrides), "--resume", resume],
            environment() | {"PYTHONIOENCODING": encoding} | variables,
            processes,
            prepare=prepare,
        )

    return run
