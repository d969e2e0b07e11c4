"""The sample of the final report: the text of tools/generate.py, and one line instead where there can be none."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import pytest
import torch

from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.commands import generate as tool
from dqt_dist.config import Config
from dqt_dist.inference import run_sample
from dqt_dist.inference.run_sample import sample_run
from tests.export.conftest import Trained

PROMPT = "A list's [bold] mutable"


def run_with_prompt(trained: Trained, prompt: str = PROMPT) -> tuple[Config, Path]:
    """Config and last checkpoint of a run that asked for a sample."""
    reader = CheckpointReader(trained())
    training = reader.config.training.model_copy(update={"sample_prompt": prompt, "sample_tokens": 12})
    return reader.config.model_copy(update={"training": training}), reader.path


def test_the_text_is_that_of_the_command_it_names(trained: Trained, capsys: pytest.CaptureFixture) -> None:
    sample = sample_run(*run_with_prompt(trained))
    assert sample.text is not None and sample.text.startswith(PROMPT) and len(sample.text) > len(PROMPT)
    computed, command = sample.explanation.split(", as by: ")
    assert computed == f"sampled in fp32 on {'cuda' if torch.cuda.is_available() else 'cpu'}"
    program, *arguments = shlex.split(command)
    assert program == "tools/generate.py" and tool.main(arguments) == 0
    assert capsys.readouterr().out == sample.text + "\n"


def test_without_transformers_the_line_says_what_to_install(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "transformers" else find(name))
    sample = sample_run(*run_with_prompt(trained))
    assert sample.text is None
    assert sample.explanation.startswith("no sample: ") and "not installed: transformers" in sample.explanation
    assert (
        "pip install 'dqt_dist[export]'" in sample.explanation
        and "; this makes one: tools/generate.py" in sample.explanation
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("CUDA out of memory.\nTried to allocate"), "RuntimeError: CUDA out of memory."),
        (MemoryError(), "MemoryError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failure_is_one_line(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, error: BaseException, reason: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(run_sample, "generate", fail)
    sample = sample_run(*run_with_prompt(trained))
    assert sample.text is None and "\n" not in sample.explanation
    assert sample.explanation.startswith(f"no sample: {reason}; this makes one: tools/generate.py --checkpoint ")
