"""Every tool's --help teaches by an example, and appears at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {
    "compare_runs": "tools/compare_runs.py runs/ternary runs/bf16",
    "convert_ckpt": "tools/convert_ckpt.py --checkpoint runs/1b_ternary --output export/1b",
    "evaluate": "tools/evaluate.py --checkpoint runs/1b_ternary --data book.txt",
    "generate": 'tools/generate.py --checkpoint runs/1b_ternary --prompt "A list is"',
    "inspect_ckpt": "tools/inspect_ckpt.py runs/demo_cpu --plot codes.png",
    "prepare_data": "tools/prepare_data.py --input python-docs",
}
HEAVY = {"torch", "megatron.core", "transformers", "datasets", "numpy", "sentencepiece", "tokenizers"}


def test_every_tool_is_here() -> None:
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.parametrize("tool", EXAMPLES)
def test_help_teaches_and_imports_nothing_heavy(tool: str) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / f"{tool}.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert EXAMPLES[tool] in shown.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in shown.stderr.splitlines()}
    assert "argparse" in imported  # negative control: the list holds imports
    assert not imported & HEAVY
