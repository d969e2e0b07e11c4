"""A checkpoint with a planted pickle: each program that opens checkpoints refuses it, and runs nothing of it."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from dqt_dist.checkpoint.folder import METADATA, resolve
from dqt_dist.commands import evaluate, generate, inspect_ckpt
from dqt_dist.errors import EXIT_CODE
from tests.checkpoint.damage import flip, plant
from tests.export.conftest import Trained, convert, tokenizer_file, trained  # noqa: F401


@pytest.fixture
def planted(trained: Trained, tmp_path: Path) -> Path:  # noqa: F811
    """A run folder whose checkpoint has a payload that makes tmp_path / executed; all digests are right."""
    run = Path(shutil.copytree(trained(), tmp_path / "planted"))
    plant(resolve(run), tmp_path / "executed")
    return run


def open_with(tool: str, run: Path, output: Path) -> int:
    """Exit code of a tool that opens `run`."""
    text = output / "text.txt"
    text.write_text("A list is a list.")
    return {
        "inspect": lambda: inspect_ckpt.main([str(run)]),
        "digest": lambda: inspect_ckpt.main([str(run), "--digest"]),
        "convert": lambda: convert("--checkpoint", run, "--output", output / "export", "--no-verify"),
        "evaluate": lambda: evaluate.main(["--checkpoint", str(run), "--data", str(text)]),
        "generate": lambda: generate.main(["--checkpoint", str(run), "--prompt", "A", "--max-tokens", "1"]),
    }[tool]()


TOOLS = ["inspect", "digest", "convert", "evaluate", "generate"]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_refuses_a_planted_pickle(
    tool: str, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert open_with(tool, planted, tmp_path) == EXIT_CODE
    message = capsys.readouterr().err
    assert f"{resolve(planted) / METADATA}: names 'posix' 'mkdir'" in message and "Traceback" not in message
    assert not (tmp_path / "executed").exists() and not (tmp_path / "export").exists()


def test_the_payload_works(planted: Path, tmp_path: Path) -> None:
    """The control of the tests above."""
    pickle.loads((resolve(planted) / METADATA).read_bytes())
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_refuses_a_flipped_bit(
    tool: str,
    trained: Trained,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    run = Path(shutil.copytree(trained(), tmp_path / "flipped"))
    flip(resolve(run) / "__0_0.distcp", 5000)
    assert open_with(tool, run, tmp_path) == EXIT_CODE
    message = capsys.readouterr().err
    assert f"{resolve(run)}: 1 bad file(s)" in message and "__0_0.distcp has another content: sha256" in message
