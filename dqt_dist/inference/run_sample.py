"""The sample in the report of a finished run: a continuation of training.sample_prompt from the run's last checkpoint.

One process makes the sample after all process groups are closed, with the generator of tools/generate.py. The
whole model is loaded once more, on the GPU where there is one, else on the CPU, with fp32 products.
"""

from __future__ import annotations

import gc
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from dqt_dist.command_line import as_typed
from dqt_dist.config import Config
from dqt_dist.errors import UserError
from dqt_dist.inference.generate import Sampling, generate
from dqt_dist.inference.language_model import open_model

# Cool, so that the sample of a short run is made of words rather than of word pieces.
TEMPERATURE = 0.5
TOP_P = 0.8


@dataclass(frozen=True)
class RunSample:
    """What the report shows of it."""

    text: str | None
    """Prompt and continuation; None when sampling failed."""
    explanation: str
    """One line: where the text was computed, or why there is none, and the command that makes the same sample."""


def sample_run(config: Config, checkpoint: Path) -> RunSample:
    """The sample of the run that wrote `checkpoint`. Never raises: a finished run keeps its exit code."""
    training = config.training
    prompt = training.sample_prompt or ""
    sampling = Sampling(TEMPERATURE, TOP_P, seed=training.seed, max_tokens=training.sample_tokens)
    command = _command(checkpoint, prompt, sampling)
    try:
        _release_training_state()
        model = open_model(checkpoint)
        pieces: list[str] = []
        generate(model, prompt, sampling, pieces.append)
    except (Exception, KeyboardInterrupt) as error:
        return RunSample(None, f"no sample: {_reason(error)}; this makes one: {command}")
    return RunSample("".join(pieces), f"sampled in fp32 on {model.device.type}, as by: {command}")


def _release_training_state() -> None:
    """Frees the memory of the trained model, and permits kernels whose sums have no fixed order."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # Under training.deterministic torch refuses the cumulative sum of top-p on a GPU.
    torch.use_deterministic_algorithms(False)


def _command(checkpoint: Path, prompt: str, sampling: Sampling) -> str:
    options = {
        "--checkpoint": checkpoint,
        "--prompt": prompt,
        "--max-tokens": sampling.max_tokens,
        "--temperature": sampling.temperature,
        "--top-p": sampling.top_p,
        "--seed": sampling.seed,
    }
    return shlex.join([as_typed("dqt-generate"), *(str(word) for option in options.items() for word in option)])


def _reason(error: BaseException) -> str:
    """The error in one line."""
    lines = str(error).splitlines() or [""]
    return lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
