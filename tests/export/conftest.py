"""Checkpoints to export: tiny models trained for two steps by the real trainer, and a tokenizer of real text."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch import Tensor

from dqt_dist.checkpoint import store
from dqt_dist.checkpoint.folder import Progress
from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.commands import convert_ckpt as tool
from dqt_dist.data.tokenizer import train_tokenizer
from dqt_dist.export.trainer_model import trainer_model
from dqt_dist.export.weights import Weights
from tests.distributed import run_distributed
from tests.parallel.runs import start

ROOT = Path(__file__).resolve().parents[2]
PIECES = 400
# Wide enough for one block of 256 codes; a vocabulary with a few rows that no piece has.
MODEL = (
    "model.num_layers=1",
    "model.hidden_size=256",
    "model.ffn_hidden_size=512",
    "model.vocab_size=408",
    "model.seq_length=96",
    # Initial weights of a larger spread than in training: logits are then far from uniform.
    "model.init_std=0.06",
    "training.global_batch_size=2",
)
NUM_STEPS = 2
TOKENS = torch.randint(PIECES, (2, 96), generator=torch.Generator().manual_seed(1))
Trained = Callable[..., Path]
Exported = Callable[..., Path]
TrainerLogits = Callable[..., Tensor]


def train_and_save(rank: int, world_size: int, *overrides: str) -> str:
    run = start(*overrides)
    for step in range(1, NUM_STEPS + 1):
        run.step(step)
    samples = NUM_STEPS * run.config.training.global_batch_size
    writer = store.open_writer(run.config)
    progress = Progress(NUM_STEPS, samples * run.config.model.seq_length, samples)
    store.save(writer, run.model_chunks, run.optimizer, run.config, progress, {"layout": "of a test"})
    writer.close()
    return run.config.checkpoint.dir


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(list(topics.values())[:40], PIECES))
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Trained:
    """trained(*overrides, processes=1): the run folder of two steps; each set of arguments is trained once."""

    @functools.cache
    def train(*overrides: str, processes: int = 1) -> Path:
        folder = tmp_path_factory.mktemp("run") / "run"
        settings = (*MODEL, *overrides, f"checkpoint.dir={folder}", f"data.tokenizer={tokenizer_file}")
        return Path(run_distributed(train_and_save, processes, *settings)[0])

    return train


def convert(*arguments: object) -> int:
    """Exit code of tools/convert_ckpt.py with these arguments, in this process."""
    return tool.main([str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """exported(format, *overrides, dtype="fp32"): the folder of an export, not verified, made once."""

    @functools.cache
    def export(export_format: str, *overrides: str, dtype: str = "fp32") -> Path:
        output = tmp_path_factory.mktemp("export") / "out"
        arguments = ("--checkpoint", trained(*overrides), "--output", output, "--format", export_format)
        assert convert(*arguments, "--dtype", dtype, "--no-verify") == 0
        return output

    return export


@pytest.fixture(scope="session")
def trainer_logits(trained: Trained) -> TrainerLogits:
    """trainer_logits(activation, *overrides): logits of the trainer's own model on `TOKENS`, in fp32."""

    @functools.cache
    def logits(activation: str, *overrides: str) -> Tensor:
        with trainer_model(Weights(CheckpointReader(trained(*overrides))), activation) as model:
            return model(TOKENS)

    return logits


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
