"""A run with a tokenizer.json: trained, resumed, evaluated, generated from, exported and brought back."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from dqt_dist.checkpoint.folder import read_manifest
from dqt_dist.data.tokenizer import load_tokenizer
from dqt_dist.errors import EXIT_CODE, UserError
from dqt_dist.export.convert import Request, convert
from dqt_dist.export.import_hf import import_hf
from dqt_dist.inference.evaluate import evaluate, read_stream
from dqt_dist.inference.generate import Sampling, generate
from dqt_dist.inference.language_model import open_model
from tests.json_tokenizers import gpt2, llama3, write
from tests.training.conftest import ROOT, Train


@pytest.mark.slow
def test_a_run_with_a_tokenizer_json(corpus: Path, config_file: Path, train: Train, tmp_path: Path) -> None:
    """data.tokenizer names the file as it came, then the one that lies beside the data: they are the same."""
    texts = list(topics.values())[:20]
    given, data, run = write(tmp_path / "hub" / "tokenizer.json", llama3(texts)), tmp_path / "data", tmp_path / "run"
    command = [sys.executable, ROOT / "tools/prepare_data.py", "--input", corpus / "text.txt", "--tokenizer", given]
    command += ["--output", data, "--valid-fraction", "0.2", "--workers", "1"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    text = config_file.read_text().replace(str(corpus / "tokenizer.model"), str(given))
    config_file.write_text(text.replace(str(corpus), str(data)))
    run.mkdir()
    shutil.copyfile(corpus / "tokenizer.model", run / "tokenizer.model")  # of another course
    assert train("training.steps=5").returncode == 0
    sha256 = load_tokenizer(given).sha256
    assert read_manifest(run / "checkpoints" / "step_00000005")["tokenizer_sha256"] == sha256
    assert (run / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()
    assert not (run / "tokenizer.model").exists()

    other = write(tmp_path / "other.json", gpt2(texts))
    refused = train("training.steps=8", f"data.tokenizer={other}")
    assert refused.returncode == EXIT_CODE and "Traceback" not in refused.stderr
    assert f"data.tokenizer: {other} (sha256 {load_tokenizer(other).sha256}) is not" in refused.stderr
    assert f"{run / 'tokenizer.json'} (sha256 {sha256})" in refused.stderr
    # The names of the data and of the tokenizer may be any; the vocabulary of the model is larger than the tokenizer's.
    resumed = train("training.steps=8", f"data.tokenizer={data / 'tokenizer.json'}")
    assert resumed.returncode == 0, resumed.stderr
    assert read_manifest(run / "checkpoints" / "step_00000008")["tokenizer_sha256"] == sha256

    export, back = tmp_path / "export", tmp_path / "back"
    convert(Request(run, export, format="hf"))
    import_hf(export, back, None, None)
    assert load_tokenizer(back / "tokenizer.json").sha256 == sha256
    figures = []
    for path in (run, export, back):
        model = open_model(path)
        assert model.tokenizer.sha256 == sha256
        stream = read_stream(str(data / "valid"), model.tokenizer, model.vocab_size, "text", 200)
        figures.append(evaluate(model, stream, None, None, 4))
        written: list[str] = []
        ids = generate(model, "A list is", Sampling(temperature=0, max_tokens=8), written.append)
        assert "".join(written) == "A list is" + model.tokenizer.decode(ids)
    assert len({figure.text_bytes for figure in figures}) == 1
    assert figures[0].loss == pytest.approx(figures[1].loss, rel=1e-3) == pytest.approx(figures[2].loss, rel=1e-3)
    with pytest.raises(UserError, match=re.escape(f"--tokenizer: {other} (sha256 ")):
        open_model(export, tokenizer=other)
