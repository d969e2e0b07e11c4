"""Suggested layouts fit, are sorted, and are what --set makes of them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from dqt_dist.config import load_config, process_grid
from dqt_dist.plan.arithmetic import device_named
from dqt_dist.plan.footprint import largest_footprint
from dqt_dist.plan.report import fits
from dqt_dist.plan.suggest import LINES, show_suggestions, suggestions

CONFIG = Path(__file__).resolve().parents[2] / "configs/1b_ternary_fp8.json"
H100 = device_named("h100")
# 49 B weights, the largest that trained on one GPU of 141 GiB.
BIG = ("model.num_layers=60", "model.hidden_size=8192", "model.ffn_hidden_size=22016", "model.num_attention_heads=64")


def test_suggestions_fit_and_the_fastest_stands_first() -> None:
    found = suggestions(CONFIG, BIG, 64, H100)
    assert 0 < len(found) <= LINES
    assert [s.seconds for s in found] == sorted(s.seconds for s in found)
    for suggestion in found:
        config = load_config(CONFIG, [*BIG, *suggestion.settings])
        memory = largest_footprint(config, process_grid(config, 64))
        assert fits(memory, H100) and memory.total == suggestion.memory_bytes
    axes = [(suggestion.tensor, suggestion.pipeline) for suggestion in found]
    assert len(set(axes)) == len(axes)


def test_a_layout_that_does_not_fit_is_not_suggested() -> None:
    """49 B weights on one H100: moments alone take 97 GiB. Control: on four they fit."""
    assert suggestions(CONFIG, BIG, 1, H100) == []
    assert "nothing fits 1 H100" in show_suggestions(CONFIG, BIG, 1, H100)
    assert suggestions(CONFIG, BIG, 4, H100)


def test_the_text_is_made_of_arguments() -> None:
    """One GPU holds the model, so the best layout is that of the config; the next one divides the model."""
    _, first, second, *_ = show_suggestions(CONFIG, (), 8, H100).splitlines()
    assert first.endswith("GiB  as configured")
    settings = [word for before, word in pairwise(second.split()) if before == "--set"]
    parallel = load_config(CONFIG, settings).parallel
    assert parallel.tensor * parallel.pipeline == 2
