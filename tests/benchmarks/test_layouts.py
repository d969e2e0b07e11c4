"""The layout table: its arithmetic on given figures, and one real run over two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.layouts import compared, layouts, wanted
from benchmarks.train_step import covered, shares_of_time

ROOT = Path(__file__).parents[2]


def test_the_union_of_spans_counts_overlaps_once() -> None:
    assert covered([]) == 0
    assert covered([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (7.0, 8.0)]) == 6.0


def test_communication_beside_a_product_is_not_exposed() -> None:
    """A step of 10: products in [0, 4] and [6, 8], communication in [3, 7] and [9, 10]. Nothing runs in [8, 9]."""

    def kernel(name: str, start: float, end: float) -> dict[str, object]:
        return {"cat": "kernel", "name": name, "ts": 100 + start, "dur": end - start}

    events = [
        kernel("nvjet_product", 0, 4),
        kernel("nvjet_product", 6, 8),
        kernel("ncclDevKernel_AllGather", 3, 7),
        kernel("ncclDevKernel_AllGather", 9, 10),
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1000},
    ]
    assert shares_of_time(events) == pytest.approx({"exposed": 0.3, "unused": 0.1})
    assert shares_of_time(events[-1:]) == {}


def test_a_pipeline_is_compared_with_what_its_bubble_leaves() -> None:
    """Two stages and 8 micro-batches: 8/9 of two GPUs; with two chunks a rank 16/17."""
    known = {layout.name: layout for layout in layouts(2, 8)}
    single, pipeline = known["one GPU, micro-batches of 2"], known["PP 2"]
    assert pipeline.bubble == pytest.approx(8 / 9) and known["PP 2, 2 chunks a rank"].bubble == pytest.approx(16 / 17)
    assert pipeline.single == single.name and known["TP 2, SP"].single == "one GPU, micro-batch 8"
    rows = {single: (900.0, 800.0), pipeline: (1200.0, 1600.0)}
    found = {
        "link": {"bytes_per_second": 1e9},
        "layouts": [
            vars(layout)
            | {
                "rows": [
                    {"variant": variant, "tokens_per_s": speed, "sent_bytes": {"gradients": 4e6}}
                    for variant, speed in zip(("none", "dqt"), speeds, strict=True)
                ]
            }
            for layout, speeds in rows.items()
        ],
    }
    last = found["layouts"][-1]
    figures = compared(last, last["rows"][1], found)
    assert figures == pytest.approx({"of ideal": 1600 / (2 * 800 * 8 / 9), "of none": 1600 / 1200, "wire_ms": 2.0})


def test_only_brings_what_it_is_compared_with() -> None:
    names = [layout.name for layout in wanted(layouts(2, 8), "PP 2, 2")]
    assert names == ["one GPU, micro-batches of 2", "PP 2, 2 chunks a rank"]
    with pytest.raises(SystemExit, match="no such layout; known: one GPU"):
        wanted(layouts(2, 8), "CP")


@pytest.mark.slow
def test_a_real_run_over_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/layouts.py", "--gpus", "2", "--only", "TP", "--methods", "dqt-fp32"]
    command += ["--steps", "1", "--warmup", "1", "--no-profile", "--seconds", "600"]
    command += ["--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["link"]["bytes_per_second"] > 0
    single, pair = (layout["rows"][0] for layout in found["layouts"])
    assert single["sent_bytes"] == {} and {"activations", "activation_maxima"} <= set(pair["sent_bytes"])
    # The layout changes the order of sums only, so both runs start from the same loss.
    assert pair["first_loss"] == pytest.approx(single["first_loss"], abs=1e-5)
