"""tools/evaluate.py: each token once, the trainer's own loss, the same figures from a text and from its preparation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.commands import evaluate as tool
from dqt_dist.data.indexed import EncodedBatch, IndexedWriter
from dqt_dist.data.tokenizer import load_tokenizer
from dqt_dist.errors import EXIT_CODE
from dqt_dist.export.trainer_model import Logits, trainer_model
from dqt_dist.export.weights import Weights
from dqt_dist.inference.evaluate import evaluate, read_stream, windows
from dqt_dist.inference.language_model import open_model
from tests import forked
from tests.export.conftest import (
    ROOT,
    Exported,
    Trained,
    exported,  # noqa: F401
    tokenizer_file,  # noqa: F401
    trained,  # noqa: F401
)

TOOL = ROOT / "tools" / "evaluate.py"
CONTEXT = 96  # of the models in tests/export/conftest.py
NONE, BITS_4, SUB_NORM = "quantization.method=none", "quantization.bits=4", "model.sub_norm=true"
TEXTS = [text[:900] for text in list(topics.values())[3:6]]
FLOATS = "quantization.activation=none"
# fp32 sums in another order; 2e-10 to 6e-9 was measured.
SUMS = 1e-6
# Activations rounded to 8 bits: a value beside the border of two codes may take the other one, and transformers'
# compressed-tensors scales them by max/127.5 where training has max/127; 2e-5 and 1e-4 were measured.
CODES = 1e-3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents as .jsonl."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def prepare(prefix: Path, tokenizer_path: Path) -> Path:
    """The same three documents as .bin and .idx."""
    tokenizer = load_tokenizer(tokenizer_path)
    ids = [[*tokenizer.encode(text), tokenizer.eod_id] for text in TEXTS]
    writer = IndexedWriter(prefix, tokenizer, "request")
    lengths, sizes = [len(i) for i in ids], [len(text.encode()) for text in TEXTS]
    writer.add_batch(EncodedBatch(np.concatenate(ids).astype(np.uint16), lengths, sizes, [1] * 3, [False] * 3))
    writer.close()
    writer.finish()
    return prefix


def figures(capsys: pytest.CaptureFixture, *arguments: object) -> dict:
    """What the tool prints as JSON."""
    assert tool.main([str(a) for a in arguments] + ["--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- the window ----


@given(num_scored=st.integers(1, 60), length=st.integers(1, 20), data=st.data())
def test_every_token_after_the_first_is_scored_once(num_scored: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    scored: list[int] = []
    for number, window in enumerate(windows(num_scored, length, stride)):
        assert 0 <= window.start < window.stop <= num_scored and window.stop - window.start <= length
        targets = range(window.stop - window.scored + 1, window.stop + 1)
        # Tokens read before the first target of the window.
        assert number == 0 or targets[0] - window.start >= length - stride + 1
        scored += targets
    assert scored == list(range(1, num_scored + 1))


def loss_by_hand(logits: Logits, stream: np.ndarray, stride: int) -> float:
    """Mean loss, one forward pass per token: the definition says from which window the token at i is predicted."""
    nats = 0.0
    for i in range(1, len(stream)):
        if i <= CONTEXT:
            start = 0
        else:
            end = min(CONTEXT + math.ceil((i - CONTEXT) / stride) * stride, len(stream) - 1)
            start = end - CONTEXT
        probabilities = logits(torch.from_numpy(stream[None, start:i].astype(np.int64)))[0, -1].double().log_softmax(-1)
        nats -= float(probabilities[stream[i]])
    return nats / (len(stream) - 1)


@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        ((FLOATS, "parallel.tensor=2"), 2),
        ((FLOATS, BITS_4, "deepspeed.zero_optimization.stage=3", "training.global_batch_size=4"), 2),
        ((FLOATS, SUB_NORM, "model.num_layers=2", "parallel.pipeline=2"), 2),
        ((NONE,), 1),
    ],
    ids=str,
)
def test_the_loss_is_the_trainers_own(
    trained: Trained,  # noqa: F811
    text: Path,
    capsys: pytest.CaptureFixture,
    overrides: tuple[str, ...],
    processes: int,
) -> None:
    """The loss of megatron-core's model with the training layers, token by token, at any layout of the checkpoint."""
    run, stride = trained(*overrides, processes=processes), 40
    arguments = ("--checkpoint", run, "--data", text, "--max-tokens", 230, "--batch-size", 3)
    found = figures(capsys, *arguments, "--stride", stride)
    stream = read_stream(str(text), open_model(run).tokenizer, 408, "text", 230)
    weights = Weights(CheckpointReader(run))
    with trainer_model(weights, weights.config.quantization.activation) as logits:
        wanted = loss_by_hand(logits, stream, stride)
    assert found["loss"] == pytest.approx(wanted, rel=SUMS)
    assert (found["tokens"], found["window"], found["stride"]) == (230, CONTEXT, stride)
    # The control: other windows are another loss.
    assert figures(capsys, *arguments)["loss"] != pytest.approx(wanted, rel=10 * SUMS)


def test_figures_follow_from_the_loss(trained: Trained, text: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    found = figures(capsys, "--checkpoint", trained(NONE), "--data", text)
    assert found["text_bytes"] == sum(len(t.encode()) for t in TEXTS)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    bits = found["loss"] * found["tokens"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / found["text_bytes"])
    assert tool.main(["--checkpoint", str(trained(NONE)), "--data", str(text)]) == 0
    shown = capsys.readouterr().out
    assert f"{found['loss']:.4f} nats per token" in shown and f"bits per byte   {found['bits_per_byte']:.4f}" in shown


# ---- what is read ----


@pytest.mark.parametrize("max_tokens", [None, 100])
def test_a_text_and_its_preparation_are_the_same_stream(
    trained: Trained,  # noqa: F811
    text: Path,
    tokenizer_file: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    max_tokens: int | None,
) -> None:
    prefix = prepare(tmp_path / "prepared", tokenizer_file)
    limit = () if max_tokens is None else ("--max-tokens", max_tokens)
    of_text = figures(capsys, "--checkpoint", trained(NONE), "--data", text, *limit)
    of_prefix = figures(capsys, "--checkpoint", trained(NONE), "--data", prefix, *limit)
    assert {**of_text, "data": None} == {**of_prefix, "data": None}
    if max_tokens:
        assert of_text["tokens"] == max_tokens and of_text["text_bytes"] < len(TEXTS[0].encode())


def test_a_document_begins_after_a_mark(tokenizer_file: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    tokenizer = load_tokenizer(tokenizer_file)
    end = tokenizer.eod_id
    wanted = [i for t in TEXTS for i in (end, *tokenizer.encode(t))]
    assert read_stream(str(text), tokenizer, 408, "text", None).tolist() == wanted
    (tmp_path / "one.txt").write_text(TEXTS[0].strip("\n"))
    one = read_stream(str(tmp_path / "one.txt"), tokenizer, 408, "text", None)
    assert one.tolist() == [end, *tokenizer.encode(TEXTS[0].strip("\n"))]


# ---- what is evaluated ----


@pytest.mark.parametrize(
    ("export_format", "overrides", "tolerance"),
    [
        ("hf", (NONE,), SUMS),
        ("hf-bitnet", (), CODES),
        ("hf-compressed", (BITS_4,), CODES),
    ],
)
def test_an_export_has_the_figures_of_its_checkpoint(
    trained: Trained,  # noqa: F811
    exported: Exported,  # noqa: F811
    text: Path,
    capsys: pytest.CaptureFixture,
    export_format: str,
    overrides: tuple[str, ...],
    tolerance: float,
) -> None:
    folder = exported(export_format, *overrides)
    capsys.readouterr()
    of_run = figures(capsys, "--checkpoint", trained(*overrides), "--data", text)
    of_export = figures(capsys, "--checkpoint", folder, "--data", text)
    assert of_export["loss"] == pytest.approx(of_run["loss"], rel=tolerance)
    # The control: the run of another method, 1 to 2 % off.
    other = figures(capsys, "--checkpoint", trained(*(() if overrides == (NONE,) else (NONE,))), "--data", text)
    assert other["loss"] != pytest.approx(of_run["loss"], rel=2 * CODES)
    assert of_export["tokens"] == of_run["tokens"] and export_format in of_export["model"]


def test_the_batch_is_not_part_of_the_result(trained: Trained, text: Path) -> None:  # noqa: F811
    model = open_model(trained(NONE))
    stream = read_stream(str(text), model.tokenizer, model.vocab_size, "text", 300)
    losses = [evaluate(model, stream, 50, 20, batch_size).loss for batch_size in (1, 2, 100)]
    assert losses == pytest.approx([losses[0]] * 3, rel=SUMS)


# ---- the command ----


def test_the_command_as_it_is_called(trained: Trained, text: Path) -> None:  # noqa: F811
    done = forked.run([TOOL, "--checkpoint", trained(NONE), "--data", text, "--max-tokens", 50, "--json"])
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["tokens"] == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "EMPTY"), "no complete checkpoint there"),
        (("--checkpoint", "none"), "no such file or folder"),
        (("--data", "none.txt"), "--data none.txt: no such file"),
        (("--data", "EMPTY"), "is a folder"),
        (("--data", "EMPTY.txt"), "holds no text"),
        (("--data", "BLANK.txt"), "holds no text"),
        (("--data", "KEYS.jsonl"), "has no key 'text'"),
        (("--data", "ODD.doc"), "unknown kind of file"),
        (("--data", "HALF"), "HALF.idx is missing"),
        (("--window", CONTEXT + 1), "was trained on 96 tokens"),
        (("--window", 10, "--stride", 11), "larger than the window of 10"),
        (("--tokenizer", "none.model"), "no file none.model"),
        (("--device", "cuda"), "torch sees no CUDA device here"),
    ],
    ids=str,
)
def test_bad_input_is_one_message(
    trained: Trained,  # noqa: F811
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "EMPTY").mkdir()
    for name, content in {"EMPTY.txt": "", "BLANK.txt": " \n\n \n", "KEYS.jsonl": '{"a": 1}\n', "ODD.doc": "a"}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "HALF.bin").write_bytes(b"ab")
    monkeypatch.chdir(tmp_path)
    given = {"--checkpoint": trained(NONE), "--data": text} | dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert tool.main([str(word) for pair in given.items() for word in pair]) == EXIT_CODE
    shown = capsys.readouterr()
    assert (
        shown.out == "" and shown.err.count("evaluate: ") == 1 and message in shown.err and "--input" not in shown.err
    )


@pytest.mark.parametrize("option", ["--stride", "--window", "--max-tokens", "--batch-size"])
def test_numbers_below_one_are_refused(option: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.main(["--checkpoint", "x", "--data", "x", option, "0"])
    assert stop.value.code == EXIT_CODE and "'0' is not a positive integer" in capsys.readouterr().err


def test_a_damaged_export_is_one_message(
    exported: Exported,  # noqa: F811
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    for number, damage in enumerate(("cut", "no tokenizer", "another architecture")):
        folder = shutil.copytree(exported("hf", NONE), tmp_path / str(number))
        if damage == "cut":
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1000])
        elif damage == "no tokenizer":
            (folder / "tokenizer.model").unlink()
        else:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
        capsys.readouterr()
        assert tool.main(["--checkpoint", str(folder), "--data", str(text)]) == EXIT_CODE, damage
        assert capsys.readouterr().err.count("evaluate: ") == 1
