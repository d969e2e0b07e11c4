"""The README and the pages in docs/ stay true: what they name exists, commands of the README run, the demo trains."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from dqt_dist.commands import convert_ckpt

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FOLDERS = ("dqt_dist", "configs", "launchers", "tools", "tests", "benchmarks", "docs")
# The log keeps the names of its time.
PAGES = sorted(
    {*ROOT.glob("*.md"), ROOT / "configs/README.md", *(ROOT / "docs").rglob("*.md")} - {ROOT / "docs/LOG.md"}
)


def missing_paths(page: Path, text: str) -> list[str]:
    """What a Markdown page names and what does not exist. Names that contain NAME are placeholders.

    A link is relative to its page. In the prose, in commands and in code spans, a path that begins with a folder of the
    repository is relative to the root, and so is a whole code span that is the path of a source file.
    """
    links = set(re.findall(r"\]\(([^)#\s]+)\)", text))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    rest = re.sub(r"\]\([^)]*\)", "]", text)
    named = set(re.findall(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)", rest))
    named |= set(re.findall(r"`([\w.-]+/[\w./-]+\.(?:py|sh|sbatch))`", rest))
    return sorted(missing + [name for name in named if "NAME" not in name and not (ROOT / name).exists()])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_of_a_page_exists(page: Path) -> None:
    assert missing_paths(page, page.read_text(encoding="utf-8")) == []


def test_a_path_that_does_not_exist_is_found() -> None:
    """Negative control: a moved folder, a short form, a link from the wrong folder."""
    text = "`dqt_dist/parallel/engine.py`, `optim/engine.py`, [a page](docs/export.md), `dqt_dist/optim/engine.py`"
    found = ["docs/export.md", "dqt_dist/parallel/engine.py", "optim/engine.py"]
    assert missing_paths(ROOT / "docs/export.md", text) == found


def test_every_page_is_in_the_index() -> None:
    """The pages of benchmarks are in benchmarks' own index."""
    for folder in (ROOT / "docs", ROOT / "docs/benchmarks"):
        linked = re.findall(r"\]\(([\w/.]+\.md)\)", (folder / "README.md").read_text())
        assert {path.name for path in folder.glob("*.md")} - {"README.md"} <= {*linked}, folder


def test_every_config_is_in_its_table() -> None:
    for config in (ROOT / "configs").glob("*.json"):
        assert f"`{config.stem}`" in README, config.stem


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in README and "make test" in (ROOT / ".ci/run").read_text()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"setup", "demo", "test", "lint"} <= set(targets)


@pytest.mark.parametrize("command", ["launchers/pretrain.py", "tools/prepare_data.py", "benchmarks/layout_parity.py"])
def test_help_teaches_with_an_example(command: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / command), "--help"], capture_output=True, text=True, check=True)
    assert command in done.stdout.split("usage:")[1].split("\n", 1)[1]


@pytest.mark.slow
def test_the_demo_command_trains_over_four_processes(tmp_path: Path) -> None:
    """The script behind `make demo`, with 8 steps: text from this Python, deepspeed's launcher, TP 2 x PP 2, report.

    Its checkpoint goes out in every format, compared with the trainer's model; GGUF in Q2_0, whose blocks of 64 divide
    its rows of 128.
    """
    run = tmp_path / "run"
    settings = ["training.steps=8", "optimizer.warmup_steps=2", "training.eval_interval=0", "training.eval_batches=1"]
    # A worker of each rank's loader would import torch once more.
    settings += ["training.sample_tokens=4", "data.num_workers=0", f"checkpoint.dir={run}"]
    command = [str(ROOT / "tools/demo.sh"), *(part for setting in settings for part in ("--set", setting))]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["layout"]["tensor"] == summary["layout"]["pipeline"] == 2
    assert summary["last_loss"] < summary["first_loss"]
    assert "bytes per low-bit weight" in done.stdout and "what it writes" in done.stdout
    for name in ("hf-bitnet", "hf-compressed", "hf", "gguf"):
        arguments = ["--checkpoint", str(run), "--output", str(tmp_path / name), "--format", name]
        assert convert_ckpt.main(arguments) == 0
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "gguf/model.gguf").tensors}
    assert {types[name] for name in types if re.search("attn_[qkvo]|ffn_(up|down|gate)", name)} == {"Q2_0"}
