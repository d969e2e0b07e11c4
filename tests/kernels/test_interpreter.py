"""Runs the tests of the kernels in Triton's interpreter, without a CUDA device and at smaller sizes.

Triton chooses its interpreter when it is imported, so these tests run in a process of their own.
tests/kernels/interpreter_instructions.py and conftest.py replace what the interpreter cannot do. The GPU tests have to
cover the rest: PTX and libdevice instructions, contraction to fused multiply-adds, and the layout of registers.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The number of tests that run. Fewer would mean that some test has lost its `run` fixture.
MIN_TESTS = 236


@pytest.mark.slow
def test_kernels_equal_their_definitions_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreter-", "-p", "no:cacheprovider", "tests/kernels"]
    # Without a CUDA device, so that launches take Triton's own way.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= MIN_TESTS, done.stdout[-1000:]


def test_the_substitutes_have_the_functions_of_the_instructions() -> None:
    """Without this test, a missing substitute would show as a failure deep in the interpreter."""

    def parameters(path: Path) -> dict[str, list[str]]:
        functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
        return {node.name: [arg.arg for arg in node.args.args] for node in functions}

    instructions = parameters(ROOT / "dqt_dist/kernels/device/instructions.py")
    substitutes = parameters(ROOT / "tests/kernels/interpreter_instructions.py")
    assert {name: substitutes.get(name) for name in instructions} == instructions
