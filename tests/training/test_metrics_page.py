"""docs/metrics.md names whatever a real run records: keys of metrics.jsonl and summary.json, tags of TensorBoard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dqt_dist.training.curves import GROUPS
from tests.training.conftest import ROOT, Train

PAGE = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
NAMED = {
    name for cell in re.findall(r"^\| (`[^|]+`) \|", PAGE, re.MULTILINE) for name in re.findall(r"`([^`]+)`", cell)
}
MATRIX = re.compile(r"layers\.\d+\.\w+\.\w+|embed_tokens|lm_head")
TEXT = re.compile(r"(?<=valid_loss\.)[\w-]+")


def unnamed(names: Iterable[str]) -> set[str]:
    """Names that no row of a table of the page begins with; MATRIX and NAME stand for what the page says they do."""
    known = NAMED | {f"{group}/{name}" for group in (*GROUPS, "8_over_matrices") for name in NAMED}
    return {name for name in names if TEXT.sub("NAME", MATRIX.sub("MATRIX", name)) not in known}


@pytest.fixture
def run(train: Train, corpus: Path, tmp_path: Path) -> Path:
    """With latents, which add a key, a matrix of the embedding, two checkpoints, two validations, two further texts."""
    settings = ("training.steps=2", "training.eval_interval=1", "training.sample_prompt=null", "checkpoint.interval=1")
    settings += ("logging.interval=1", "logging.histogram_interval=1")
    settings += ("quantization.latent_bits=4", "quantization.embeddings=true")
    texts = {"same-text": [{"path": str(corpus / "valid")}], "train": [{"path": str(corpus / "train")}]}
    done = train(*settings, f"data.valid_texts={json.dumps(texts)}")
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def assert_each_text_has_a_loss_of_its_own(lines: list[dict], summary: dict) -> None:
    """The same text has the same loss, to the bit."""
    found = [line for line in lines if "valid_loss" in line]
    assert len(found) == 2
    for line in found:
        assert line["valid_loss.same-text"] == line["valid_loss"] != line["valid_loss.train"]
    assert summary["valid_text_losses"] == {name: found[-1][f"valid_loss.{name}"] for name in ("same-text", "train")}


def test_every_number_of_a_run_is_explained(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = {key for line in lines for key in line}
    summary = json.loads((run / "summary.json").read_text())
    events = EventAccumulator(str(run / "tb")).Reload()
    tags = {*events.Tags()["scalars"], *events.Tags()["histograms"]}
    assert {"loss", "valid_loss", "save_bytes", "latent_flip_rate"} <= keys
    assert {"1_loss/loss", "9_codes_of_matrices/layers.0.self_attn.q_proj", "9_saturation_of_matrices/lm_head"} <= tags
    assert unnamed(keys) == unnamed(summary) == unnamed(tags) == set()
    # The other way: what the page names is recorded, so a key that is gone leaves the page too.
    recorded = keys | summary.keys() | {MATRIX.sub("MATRIX", tag) for tag in tags}
    assert recorded >= {name for name in NAMED if "NAME" not in name}
    assert_each_text_has_a_loss_of_its_own(lines, summary)


def test_what_the_page_does_not_name_is_found() -> None:
    """Negative control."""
    of_matrices = ["9_codes_of_matrices/layers.0.mlp.up_proj", "9_code_of_matrices/layers.0.mlp.up_proj"]
    names = ["loss", "losses", "1_loss/loss", "1_loss/losses", *of_matrices]
    assert unnamed(names) == {"losses", "1_loss/losses", "9_code_of_matrices/layers.0.mlp.up_proj"}
