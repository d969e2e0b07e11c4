"""EleutherAI's lm-eval on an exported folder, offline, with a task of its own: tools/evaluate.py finds the same figure.

lm-eval's rolling windows do not overlap and begin with one token of context. tools/evaluate.py does the same with the
stride of the window. </s> stands before the document in both (prefix_token_id=2). The same engine scores the same
tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from dqt_dist.commands import evaluate as tool
from tests.export.conftest import Exported, exported, tokenizer_file, trained  # noqa: F401

TASK = """\
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
# lm-eval adds the log-likelihoods of a window in fp32, here float64 is used; 2e-8 was measured.
SUMS = 1e-6


def lm_eval(folder: Path, tasks: Path, output: Path) -> dict[str, float]:
    """Figures of the task by metric, from lm-eval's command without a network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(output / "cache")}
    # bitnet's forward would spend a minute compiling.
    environment = os.environ | offline | {"TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "local_text", "--include_path", str(tasks)]
    command += ["--model_args", f"pretrained={folder},dtype=float32,prefix_token_id=2"]
    command += ["--device", "cpu", "--batch_size", "1", "--output_path", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next(output.rglob("results*.json")).read_text())["results"]["local_text"]
    return {name.removesuffix(",none"): value for name, value in results.items() if isinstance(value, float)}


@pytest.mark.slow
def test_lm_eval_and_evaluate_agree(
    exported: Exported,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    text = list(topics.values())[3][:1200]
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_text.yaml").write_text(TASK.format(file=file))
    folder = exported("hf-bitnet")
    theirs = lm_eval(folder, tmp_path / "tasks", tmp_path / "out")
    capsys.readouterr()
    arguments = ["--checkpoint", str(folder), "--data", str(file), "--json"]
    assert tool.main(arguments) == 0
    ours = json.loads(capsys.readouterr().out)
    assert ours["tokens"] > 3 * ours["window"] and ours["text_bytes"] == len(text.encode())
    assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=SUMS)
    assert 2 ** ours["bits_per_byte"] == pytest.approx(theirs["byte_perplexity"], rel=10 * SUMS)
    # The control: overlapping windows are another figure.
    assert tool.main([*arguments, "--stride", "30"]) == 0
    other = json.loads(capsys.readouterr().out)["bits_per_byte"]
    assert other != pytest.approx(theirs["bits_per_byte"], rel=100 * SUMS)
