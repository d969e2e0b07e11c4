"""docs/scaling.md says what the planner says: the page and its picture are made of its figures, the figures are the
planner's."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from docs import scaling_page
from docs.scaling_page import MODELS, Figure, Figures, figure, page, to_json

TEXT = scaling_page.FIGURES.read_text(encoding="utf-8")
ANEW = "docs/scaling_page.py writes it anew"
SOME = {"1B": 4096, "7B": 2, "13B": 4096, "70B": 32, "405B": 3584}
"""Of each model one number of GPUs that both methods fit. All of them take half a minute."""


def test_the_page_and_the_picture_are_made_of_the_figures() -> None:
    written = scaling_page.PAGE.read_text(encoding="utf-8")
    assert written == page(Figures(TEXT)), ANEW
    assert scaling_page.digest(TEXT) in scaling_page.PLOTS.read_text(encoding="utf-8"), ANEW
    text = [line for line in written.splitlines() if not line.startswith("|")]
    assert max(map(len, text)) <= scaling_page.WIDTH


def test_another_figure_makes_another_page() -> None:
    found = [Figure(**values) for values in json.loads(TEXT)]
    other = [replace(found[0], tokens_per_second=found[0].tokens_per_second + 1), *found[1:]]
    assert to_json(found) == TEXT and to_json(other) != TEXT
    assert page(Figures(to_json(other))) != page(Figures(TEXT))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_figures_are_the_planner_s(model: scaling_page.Model) -> None:
    """At one number of GPUs, and that nothing fits half of the smallest one."""
    found = Figures(TEXT)
    for method in scaling_page.METHODS:
        item = figure(model, method, SOME[model.name])
        assert item is not None
        assert asdict(item) == asdict(found.at(model.name, method, item.gpus)), ANEW
        smallest = found.of(model.name, method)[0].gpus
        assert smallest == 1 or figure(model, method, smallest // 2) is None, ANEW


def test_figures_agree_with_themselves() -> None:
    """Parts of a step add up to its time, layouts to the GPUs, micro-batches to the batch, and all fit the device."""
    found = Figures(TEXT)
    for model in MODELS:
        samples, tokens = scaling_page.samples_and_tokens(model)
        for item in (item for item in found.all if item.model == model.name):
            assert item.step * item.tokens_per_second == pytest.approx(tokens, rel=1e-3)
            assert item.tensor * item.pipeline * item.data == item.gpus
            assert item.data * item.micro_batch * item.micro_batches == samples
            assert item.gib <= scaling_page.DEVICE.memory_gib - scaling_page.RESERVED_GIB
            assert item.of_ideal <= 1 and item.far <= sum(item.sent.values())
