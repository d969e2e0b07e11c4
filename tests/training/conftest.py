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

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 512


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train, valid and tokenizer.model: some chapters of Python's language reference."""
    folder = tmp_path_factory.mktemp("corpus")
    text = "\n\n".join(list(topics.values())[:60])
    (folder / "text.txt").write_text(text)
    command = [
        sys.executable,
        str(ROOT / "tools/prepare_data.py"),
        "--input",
        str(folder / "text.txt"),
        "--output",
        str(folder),
    ]
    command += ["--vocab-size", str(VOCABULARY), "--valid-fraction", "0.2", "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True)
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


def command(config_file: Path, *overrides: str, processes: int = 1) -> list[str]:
    """The command of a user: one process without a launcher, several processes under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    settings = [part for override in overrides for part in ("--set", override)]
    return [*launcher, str(ROOT / "launchers/pretrain.py"), "--config", str(config_file), *settings]


def environment() -> dict[str, str]:
    return os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
    }


Train = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def train(config_file: Path) -> Train:
    """Returns train(*overrides, processes=1, resume="auto"), which makes a whole run in its own processes.

    `encoding` is that of the run's terminal.
    """

    def run(
        *overrides: str, processes: int = 1, resume: str = "auto", encoding: str = "utf-8"
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command(config_file, *overrides, processes=processes), "--resume", resume],
            env=environment() | {"PYTHONIOENCODING": encoding},
            capture_output=True,
            text=True,
            timeout=180,
        )

    return run
