"""The numbers of metrics.jsonl as curves, for TensorBoard and Weights & Biases: which group each stands in.

TensorBoard sorts groups by name and opens the first ones, so the groups are numbered by how often one looks at them.
What exists once per matrix, some hundred curves in a large model, comes last.

    1_loss            loss, validation, gradient norm, skipped steps        5_memory      peak of a rank
    2_learning_rates  of ordinary weights and of low-bit ones               6_sent_bytes  per step, by kind
    3_codes           shares that flipped, are 0, were clamped              7_saves       seconds and bytes
    4_speed           tokens/s, TFLOP/s, MFU                                8_, 9_        of the matrices
"""

from __future__ import annotations

import hashlib
import importlib
import re
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dqt_dist.config import Config
from dqt_dist.errors import UserError
from dqt_dist.training.low_bit_metrics import METRIC_OF_COUNT, LowBitMetrics

GROUPS = {
    "1_loss": r"loss|valid_loss(\.[\w-]+)?|valid_perplexity|grad_norm|skipped_steps",
    "2_learning_rates": r"lr|low_bit_lr",
    "3_codes": "|".join(METRIC_OF_COUNT.values()),
    "4_speed": r"tokens|tokens_per_s|tflops_per_s|mfu",
    "5_memory": r"peak_memory_bytes",
    "6_sent_bytes": r"\w+_sent_bytes",
    "7_saves": r"save_\w+",
}
"""The metrics of each group, as a regular expression of their whole names."""


def tag(metric: str) -> str:
    """Where a metric of metrics.jsonl stands: GROUP/metric."""
    (group,) = (group for group, names in GROUPS.items() if re.fullmatch(names, metric))
    return f"{group}/{metric}"


class TensorBoard:
    """Writes curves and histograms into `folder`. Steps from `first_step` on replace those of an earlier process."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=first_step if first_step > 1 else None)

    def add_numbers(self, step: int, numbers: dict[str, float]) -> None:
        """A point of each metric."""
        for metric, value in numbers.items():
            self.writer.add_scalar(tag(metric), value, step)

    def add_codes(self, step: int, metrics: LowBitMetrics, histograms: Tensor, first_code: int) -> None:
        """For each metric of codes a histogram over the matrices and a curve per matrix; per matrix one of its codes.

        histograms: int64 [matrices, levels], counts of the codes from `first_code` on.
        """
        for column, metric in enumerate(metrics.metric_names):
            self.writer.add_histogram(f"8_over_matrices/{metric}", metrics.per_matrix[:, column], step)
            for name, value in zip(metrics.names, metrics.per_matrix[:, column].tolist(), strict=True):
                self.writer.add_scalar(f"9_{metric}_of_matrices/{name}", value, step)
        for name, counts in zip(metrics.names, histograms, strict=True):
            self._add_code_histogram(f"9_codes_of_matrices/{name}", counts, first_code, step)

    def _add_code_histogram(self, name: str, counts: Tensor, first_code: int, step: int) -> None:
        codes = [first_code + i for i in range(len(counts))]
        values = counts.double()
        grid = values.new_tensor([float(code) for code in codes])
        self.writer.add_histogram_raw(
            name,
            min=codes[0],
            max=codes[-1],
            num=int(counts.sum()),
            sum=float((values * grid).sum()),
            sum_squares=float((values * grid.square()).sum()),
            bucket_limits=[code + 0.5 for code in codes],
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """Sends the curves, without those of matrices, to the project logging.wandb_project; in offline mode to wandb/.

    A run folder is one run there: its id is the folder's absolute path, hashed, so a resumed run goes on in its curves.
    The step is a value beside the others, because a resumed run repeats steps, and wandb's own step cannot go back.
    """

    def __init__(self, config: Config) -> None:
        assert config.logging.wandb_project is not None
        folder = Path(config.checkpoint.dir).absolute()
        self.run = _wandb().init(
            project=config.logging.wandb_project,
            name=folder.name,
            id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def add_numbers(self, step: int, numbers: dict[str, float]) -> None:
        """A point of each metric."""
        self.run.log({"step": step} | {tag(metric): value for metric, value in numbers.items()})

    def close(self) -> None:
        self.run.finish()


def check_wandb(config: Config) -> None:
    """Raises UserError when the config asks for wandb and the package is not there."""
    if config.logging.wandb_project is not None:
        _wandb()


def _wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            "logging.wandb_project: the package wandb is not installed; install it with: pip install "
            "'dqt_dist[wandb]', or leave the field out"
        ) from error
