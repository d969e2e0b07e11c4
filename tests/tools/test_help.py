"""Every tool's --help teaches by an example, and appears at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {
    "launchers/slurm/submit": "launchers/slurm/submit.py --config configs/1b_ternary.json --nodes 2 --gpus-per-node 8",
    "tools/compare_runs": "tools/compare_runs.py runs/ternary runs/bf16",
    "tools/convert_ckpt": "tools/convert_ckpt.py --checkpoint runs/1b_ternary --output export/1b",
    "tools/evaluate": "tools/evaluate.py --checkpoint runs/1b_ternary --data book.txt",
    "tools/generate": 'tools/generate.py --checkpoint runs/1b_ternary --prompt "A list is"',
    "tools/inspect_ckpt": "tools/inspect_ckpt.py runs/demo_cpu --plot codes.png",
    "tools/prepare_data": "tools/prepare_data.py --input python-docs",
}
HEAVY = {"torch", "megatron.core", "transformers", "datasets", "numpy", "sentencepiece", "tokenizers"}


def test_every_tool_is_here() -> None:
    """launchers/pretrain.py imports more, and has a test of its own: tests/config/test_command.py."""
    scripts = {*(ROOT / "tools").glob("*.py"), *(ROOT / "launchers/slurm").glob("*.py")}
    assert {str(path.relative_to(ROOT).with_suffix("")) for path in scripts} == EXAMPLES.keys()


@pytest.mark.parametrize("tool", EXAMPLES)
def test_help_teaches_and_imports_nothing_heavy(tool: str) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / f"{tool}.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert EXAMPLES[tool] in shown.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in shown.stderr.splitlines()}
    assert "argparse" in imported  # negative control: the list holds imports
    assert not imported & HEAVY
