"""docs/architecture.md is correct: it lists all folders and the files of a step, and its picture matches the source."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from docs import architecture_picture
from tests.distributed import run_distributed
from tests.parallel.runs import start
from tests.test_import_layers import MODULES, ORDER, layer_of, module_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
MOST_FILES = 10


def test_every_folder_has_its_question() -> None:
    asked = architecture_picture.questions()
    assert set(asked) == set(ORDER) == {layer_of(module_name(path)) for path in MODULES} - {None}
    assert all(question.endswith("?") for question in asked.values())


def test_every_path_it_names_exists() -> None:
    named = set(re.findall(r"\b((?:dqt_dist|tests|benchmarks|launchers|docs)/[\w./-]+\w)", PAGE)) - {
        "dqt_dist/kernels/NAME.py",
        "dqt_dist/kernels/NAME_triton.py",
    }
    assert len(named) > 25
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_picture_is_drawn_from_the_source() -> None:
    drawn = subprocess.run([sys.executable, str(ROOT / "docs/architecture_picture.py"), "--check"], check=False)
    assert drawn.returncode == 0, "docs/architecture_picture.py draws docs/architecture.svg anew"


def files_of_a_step(rank: int, world_size: int) -> list[str]:
    """Files of the package whose code runs in the second step, from a profile of every Python call of the rank."""
    run = start()
    run.step(1)
    seen: set[str] = set()

    def call(frame, event, argument) -> None:
        seen.add(frame.f_code.co_filename)

    with torch.autograd.set_multithreading_enabled(False):  # backward runs in the profiled thread
        sys.setprofile(call)
        run.step(2)
        sys.setprofile(None)
    package = str(ROOT / "dqt_dist")
    return sorted(str(Path(name).relative_to(ROOT)) for name in seen if name.startswith(package))


def test_the_files_of_a_step_run_in_a_step() -> None:
    """All files of the list run, except the loop, which calls the step. Control: a file of the export does not run."""
    listed = [path for path, _ in architecture_picture.step_files()]
    assert 5 < len(listed) <= MOST_FILES
    ran = run_distributed(files_of_a_step, 1)[0]
    assert set(listed) - set(ran) == {"dqt_dist/training/loop.py"}
    assert "dqt_dist/export/convert.py" not in ran


def test_calls_lead_from_each_file_of_the_list_to_the_next_ones() -> None:
    """Each file except the first is imported by a file before it in the list."""
    listed = [path for path, _ in architecture_picture.step_files()]
    modules = [path.removesuffix(".py").replace("/", ".") for path in listed]
    for index, module in enumerate(modules[1:], start=1):
        sources = "".join((ROOT / path).read_text(encoding="utf-8") for path in listed[:index])
        package, name = module.rsplit(".", 1)
        parts = (module, f"from {package} import {name}")
        assert any(part in sources for part in parts) or module in (
            "dqt_dist.layers.low_bit_linear",  # Megatron's schedule calls the modules of the layer spec
            "dqt_dist.lowbit.gradient_buffer",  # an attribute of the weight
        ), module
