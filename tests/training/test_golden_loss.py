"""Twenty recorded losses. A change that is not meant to change numbers must not change these losses.

When a change is meant to change them, record them again with the command in the header of the file.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import torch

from tests.distributed import run_distributed
from tests.parallel.runs import start

FILE = Path(__file__).resolve().parents[1] / "assets/losses/small_cpu.txt"
COMMAND = "python -m tests.training.test_golden_loss"
STEPS = 20
OVERRIDES = (
    "optimizer.schedule=cosine",
    "optimizer.warmup_steps=4",
    "training.steps=20",
    "optimizer.learning_rate=3e-2",
)
# Other vector instructions add up in another order. When a rounding draw falls into the resulting gap, the later losses
# change. The losses of seven layouts and micro-batch sizes, whose sums differ in the same way, differed by 1.4e-4 at
# most. The tolerance is seven times that.
TOLERANCE = 1e-3


def losses(rank: int, world_size: int, *overrides: str) -> list[float]:
    """All steps use one batch, so that the loss falls and depends on every part of the update."""
    run = start(*OVERRIDES, *overrides)
    return [run.mean_loss(run.step(1)) for _ in range(STEPS)]


def read() -> list[float]:
    lines = FILE.read_text().splitlines()
    return [float(line.split()[1]) for line in lines if not line.startswith("#")]


def test_losses_are_the_written_ones() -> None:
    wanted = read()
    found = run_distributed(losses, 1)[0]
    assert len(wanted) == STEPS and wanted[-1] < wanted[0] - 0.5
    worst = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    assert worst <= TOLERANCE, f"off by {worst:.1e}; if this was meant: {COMMAND}\n{found}"
    assert abs(found[0] - wanted[0]) <= 1e-5, "the first loss has met no rounding draw yet"


def test_another_rate_decay_or_moment_is_seen() -> None:
    """Negative controls: changes that the tolerance must not hide."""
    wanted = read()
    for override in ("optimizer.low_bit_learning_rate=6e-3", "optimizer.beta2=0.9", "optimizer.weight_decay=0.0"):
        found = run_distributed(losses, 1, override)[0]
        assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) > TOLERANCE, override


def test_small_moments_lose_as_two_of_32_bits() -> None:
    """The whole run stays within 0.02 of the recorded losses. Control: twice the rate.

    Measured over three seeds: 0.004 with 8 bits; 0.003 to 0.009 with a factored second moment. The seeds themselves
    differ by 0.02.
    """
    wide = "model.ffn_hidden_size=64"  # blocks of 32 columns
    wanted = run_distributed(losses, 1, wide)[0]
    cases = {
        "optimizer.state_bits=8": True,
        "optimizer.second_moment=factored": True,
        "optimizer.low_bit_learning_rate=1e-2": False,
    }
    for override, same in cases.items():
        found = run_distributed(losses, 1, wide, override)[0]
        assert (max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 0.02) == same, override


def main() -> None:
    header = [
        "# step loss: the small configuration of tests/small.py, one process, CPU, fp32, ternary",
        f"# {COMMAND}",
        f"# {datetime.date.today()}, torch {torch.__version__}, Python {sys.version.split()[0]}",
    ]
    lines = [f"{step} {loss:.6f}" for step, loss in enumerate(run_distributed(losses, 1)[0], start=1)]
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text("\n".join([*header, *lines]) + "\n")


if __name__ == "__main__":
    main()
