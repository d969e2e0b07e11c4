"""Loss spikes: a step whose loss lies far above the losses just before it is skipped.

The window holds the losses of the last `training.spike_window` steps that were not skipped, each the mean over the
global batch. A loss is a spike when

    loss > mean(window) + training.spike_deviations * standard deviation(window)

Until the window is full its free places are nan, which no loss is above. A spike does not enter the window. Otherwise
one spike would widen the deviation for as long as it stays there, and hide those that follow. When losses stay high,
`training.max_skipped_steps` ends the run.

Everything stays on the device: every rank has the same window, decides alike and waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def new_window(size: int, losses: Sequence[float], device: torch.device) -> Tensor:
    """A window, fp64 [size], that holds the last of `losses`, oldest first."""
    kept = list(losses)[-size:]
    return torch.tensor([math.nan] * (size - len(kept)) + kept, dtype=torch.float64, device=device)


def losses_of(window: Tensor) -> list[float]:
    """The losses in a window, oldest first, on the host."""
    return window[window.isfinite()].tolist()


def is_spike(loss: Tensor, window: Tensor, deviations: float) -> Tensor:
    """Whether `loss`, a scalar, lies more than `deviations` standard deviations above the mean of a full window."""
    return loss > window.mean() + deviations * window.std(correction=0)


def pushed(window: Tensor, loss: Tensor, keep: Tensor) -> Tensor:
    """The window after a step: with `loss` as its newest where `keep` is true, as it was otherwise."""
    return torch.where(keep, torch.cat([window[1:], loss.view(1)]), window)
