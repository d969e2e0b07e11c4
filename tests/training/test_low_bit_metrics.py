"""Flip rate, zero fraction and saturation equal counts over the whole model, in every layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dqt_dist.training.low_bit_metrics import METRIC_OF_COUNT, LowBitMetricsCollector
from tests.distributed import run_distributed
from tests.parallel.runs import Whole, codes, start, whole_state
from tests.small import small_config

LAYOUTS = {
    "one": (1,),
    "DP 2": (2,),
    "TP 2 DP 2 ZeRO 1": (4, "parallel.tensor=2", "deepspeed.zero_optimization.stage=1"),
    "PP 2": (2, "parallel.pipeline=2"),
}


def metrics_and_states(
    rank: int, world_size: int, *overrides: str
) -> tuple[dict[str, float], dict[str, Tensor], Tensor, Whole, Whole]:
    run = start(*overrides)
    collector = LowBitMetricsCollector(run.optimizer.low_bit, run.config, run.groups)
    run.step(1)
    before = {name: tensor.clone() for name, tensor in whole_state(run).items()}
    run.step(2)
    metrics, histograms = collector.collect(), collector.code_histograms(run.optimizer.low_bit.grid)
    per_matrix = dict(zip(metrics.names, metrics.per_matrix, strict=True))
    return metrics.overall, per_matrix, histograms, before, whole_state(run)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics_are_counts_over_the_whole_model(layout: str) -> None:
    bits = "quantization.bits=4"
    world_size, *parallel = LAYOUTS[layout]
    overall, per_matrix, histograms, before, after = run_distributed(metrics_and_states, world_size, bits, *parallel)[0]
    config = small_config(bits)
    old, new = dict(codes(before, config)), dict(codes(after, config))
    assert len(new) == len(per_matrix) == len(histograms) == 14
    for (name, metrics), histogram in zip(per_matrix.items(), histograms, strict=True):
        now, then = new[f"codes/{name}"], old[f"codes/{name}"]
        assert float(metrics[0]) == float((now != then).double().mean())
        assert float(metrics[1]) == float((now == 0).double().mean())
        assert histogram.tolist() == [int((now == code).sum()) for code in range(-8, 8)]
    everything = torch.cat([tensor.flatten() for tensor in new.values()])
    assert overall["zero_fraction"] == float((everything == 0).double().mean())
    assert 0 < overall["flip_rate"] < 1 and tuple(overall) == tuple(METRIC_OF_COUNT.values())[:3]


@pytest.mark.parametrize("bits", ["ternary", 8])
def test_saturation_is_rare_only_on_a_wide_grid(bits: str | int) -> None:
    """A third of ternary codes are at each end, half of them with a wanted weight beyond. 8 bits reach six sigma."""
    overall, *_ = run_distributed(metrics_and_states, 1, f"quantization.bits={bits}")[0]
    assert 0.1 < overall["saturation"] < 0.5 if bits == "ternary" else overall["saturation"] == 0
