"""tools/generate.py: the cache changes no token, a seed fixes the draws, text comes token by token."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.commands import generate as tool
from dqt_dist.errors import EXIT_CODE
from dqt_dist.export.trainer_model import trainer_model
from dqt_dist.export.weights import Weights
from dqt_dist.inference.generate import Sampling, encode_prompt, generate
from dqt_dist.inference.language_model import LanguageModel, open_model
from tests.export.conftest import (
    ROOT,
    Exported,
    Trained,
    exported,  # noqa: F401
    tokenizer_file,  # noqa: F401
    trained,  # noqa: F401
)
from tests.export.test_hf import FLOATS, FP32, INT8

TOOL = ROOT / "tools" / "generate.py"
NONE, BITS_4, SUB_NORM = "quantization.method=none", "quantization.bits=4", "model.sub_norm=true"
PROMPT = "A list is a mutable sequence"
CONTEXT = 96  # of the models in tests/export/conftest.py
GREEDY = Sampling(temperature=0, max_tokens=40)


def continue_prompt(model: LanguageModel, sampling: Sampling, prompt: str = PROMPT) -> tuple[list[int], list[str]]:
    """Ids of the continuation, and the texts in the order in which they were written."""
    written: list[str] = []
    return generate(model, prompt, sampling, written.append), written


@pytest.fixture(scope="module")
def model(trained: Trained) -> LanguageModel:  # noqa: F811
    return open_model(trained())


# ---- the cache ----


@pytest.mark.parametrize("overrides", [(), (FLOATS,), (BITS_4,), (SUB_NORM,), (NONE,)], ids=str)
def test_with_the_cache_as_by_the_trainers_model_without(trained: Trained, overrides: tuple[str, ...]) -> None:  # noqa: F811
    """Token by token, each from a full forward pass of the training layers.

    Two best tokens whose logits differ by less than the noise of fp32 (or of one 8-bit code) are both right.
    """
    run = trained(*overrides)
    opened = open_model(run)
    found, _ = continue_prompt(opened, GREEDY)
    prompt = encode_prompt(opened, PROMPT)
    weights = Weights(CheckpointReader(run))
    activation = weights.config.quantization.activation
    tolerance = (INT8 if activation == "int8" else FP32).relative

    def surprises(first: int) -> int:
        """Tokens that are not the best one, read from position `first` of the text on."""
        text, wrong = torch.tensor([[*prompt, *found]]), 0
        for end in range(len(prompt), text.shape[1]):
            # Rows of the vocabulary without a piece are never drawn.
            logits = trainer(text[:, first:end])[0, -1, : opened.tokenizer.vocab_size]
            wrong += bool(logits[text[0, end]] < logits.max() - tolerance * logits.abs().max())
        return wrong

    with trainer_model(weights, activation) as trainer:
        assert len(found) == GREEDY.max_tokens and surprises(0) == 0
        # The control: a cache without the first tokens of the prompt says something else.
        assert surprises(len(prompt) - 1) > 0


@pytest.mark.parametrize(("export_format", "overrides"), [("hf", (NONE,)), ("hf-bitnet", ())])
def test_an_export_says_what_its_checkpoint_says(
    trained: Trained,  # noqa: F811
    exported: Exported,  # noqa: F811
    export_format: str,
    overrides: tuple[str, ...],
) -> None:
    """Compares the first tokens only: later a difference of one 8-bit code could have become another text."""
    few = dataclasses.replace(GREEDY, max_tokens=8)
    by_run = continue_prompt(open_model(trained(*overrides)), few)
    assert continue_prompt(open_model(exported(export_format, *overrides)), few) == by_run


# ---- the draws ----


def test_the_seed_fixes_the_text(model: LanguageModel) -> None:
    texts = []
    for seed in (3, 4, 3):
        torch.rand(7)  # whatever was drawn before
        texts.append(continue_prompt(model, Sampling(seed=seed, max_tokens=30)))
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_narrow_draws_are_the_best_tokens(model: LanguageModel, narrow: dict) -> None:
    sampling = Sampling(**{"temperature": 2.0, "top_p": 1.0, "max_tokens": 20} | narrow)
    best = continue_prompt(model, dataclasses.replace(GREEDY, max_tokens=20))[0]
    assert continue_prompt(model, sampling)[0] == best
    wide = Sampling(temperature=2.0, top_p=1.0, max_tokens=20)  # the control
    assert continue_prompt(model, wide)[0] != best


def test_nothing_but_the_options_narrows_the_draw(model: LanguageModel) -> None:
    """transformers' default top-k of 50 is off: at a high temperature all 400 pieces are about equally likely."""
    drawn, _ = continue_prompt(model, Sampling(temperature=1e4, top_p=1.0, max_tokens=60))
    text = torch.tensor([*encode_prompt(model, PROMPT), *drawn])
    with torch.no_grad():
        logits = model.model(text[None]).logits[0]
    first = len(text) - len(drawn)
    ranks = [int((logits[i - 1] > logits[i - 1, text[i]]).sum()) for i in range(first, len(text))]
    assert max(ranks) > 100


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-30])
def test_the_smallest_temperatures_are_the_best_tokens(model: LanguageModel, temperature: float) -> None:
    """1e-45 is no fp32 number that divides: logits / 1e-45 would be inf, and the draw an error."""
    assert (
        continue_prompt(model, Sampling(temperature, 1.0, max_tokens=12))[0]
        == (continue_prompt(model, dataclasses.replace(GREEDY, max_tokens=12))[0])
    )


@pytest.mark.parametrize("temperature", [0, 1.7e308])
def test_no_row_without_a_piece_is_drawn(model: LanguageModel, temperature: float) -> None:
    """The model has 408 rows. With a tokenizer of 5 pieces, the control, the other rows are what it would draw."""
    sampling = Sampling(temperature, 1.0, max_tokens=60)
    assert max(continue_prompt(model, sampling)[0]) >= 5
    few = copy.copy(model.tokenizer)
    few.vocab_size = 5
    ids = continue_prompt(dataclasses.replace(model, tokenizer=few), sampling)[0]
    assert ids and max(ids) < 5


# ---- the text ----


def test_text_comes_token_by_token(model: LanguageModel) -> None:
    """The text of a token is written before the next token is computed; the prompt before the second token is."""
    passes, written = 0, []

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = model.model.register_forward_hook(count)
    ids = generate(model, PROMPT, GREEDY, lambda text: written.append((passes, text)))
    handle.remove()
    prompt = len(encode_prompt(model, PROMPT))
    assert "".join(text for _, text in written[:prompt]) == PROMPT
    assert [at for at, _ in written] == [0] * prompt + list(range(1, len(ids) + 1)) + [len(ids)]


@pytest.mark.parametrize("prompt", ["na\u00efve \u4f60\u597d \U0001f600", "  two spaces\n\ttab", "a"])
def test_the_prompt_comes_back_as_it_is(model: LanguageModel, prompt: str) -> None:
    ids, written = continue_prompt(model, dataclasses.replace(GREEDY, max_tokens=1), prompt)
    assert "".join(written).startswith(prompt) and len(ids) == 1


def test_an_empty_prompt_begins_a_document(model: LanguageModel) -> None:
    assert encode_prompt(model, "") == [model.tokenizer.eod_id]
    assert len(continue_prompt(model, GREEDY, "")[0]) == GREEDY.max_tokens


def test_it_ends_with_the_context_and_with_the_document(model: LanguageModel) -> None:
    prompt = encode_prompt(model, PROMPT)
    to_the_end, _ = continue_prompt(model, dataclasses.replace(GREEDY, max_tokens=1000))
    assert len(prompt) + len(to_the_end) == CONTEXT
    # Let the mark that ends a document be the third token that this model says.
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.eod_id = to_the_end[2]
    ended, _ = continue_prompt(dataclasses.replace(model, tokenizer=tokenizer), GREEDY)
    assert ended == to_the_end[: to_the_end.index(tokenizer.eod_id) + 1]


# ---- the command ----


def test_the_command_as_it_is_called(trained: Trained) -> None:  # noqa: F811
    command = [sys.executable, TOOL, "--checkpoint", trained(), "--prompt", PROMPT, "--max-tokens", "5", "--top-k", "9"]
    done = subprocess.run(list(map(str, command)), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith(PROMPT) and done.stdout.endswith(b"\n")
    told = done.stderr.decode().splitlines()
    assert len(told) == 2 and "step 2, ternary, activations int8, fp32 on" in told[0] and "5 tokens" in told[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "EMPTY"), "no complete checkpoint there"),
        (("--checkpoint", "none"), "no such file or folder"),
        (("--prompt", "word " * 200), "the model's context has 96; nothing can follow"),
        (("--tokenizer", "none.model"), "no file none.model"),
        (("--device", "cuda"), "torch sees no CUDA device here"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_one_message(
    trained: Trained,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.chdir(tmp_path)
    given = {"--checkpoint": trained(), "--prompt": PROMPT} | {arguments[0]: arguments[1]}
    assert tool.main([str(word) for pair in given.items() for word in pair]) == EXIT_CODE
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("generate: ") == 1 and message in shown.err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "-0.1"),
        ("--temperature", "inf"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--top-p", "1.1"),
        ("--top-k", "0"),
        ("--max-tokens", "0"),
        ("--seed", "x"),
    ],
)
def test_numbers_out_of_range_are_refused(option: str, value: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.main(["--checkpoint", "x", "--prompt", "x", option, value])
    shown = capsys.readouterr().err
    assert stop.value.code == EXIT_CODE and option in shown and ("out of range" in shown or "invalid number" in shown)
