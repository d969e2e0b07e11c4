"""What a run writes down: metrics.jsonl, TensorBoard, the progress bar, summary.json. Only rank 0 writes.

A run folder:

    config.json       the complete config            metrics.jsonl   one line a logged step
    tb/               TensorBoard                    checkpoints/    step_NNNNNNNN
    summary.json      at the end
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dqt_dist.config import Config, to_json
from dqt_dist.training.low_bit_figures import FIGURES, LowBitFigures


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


class Recorder:
    """Writes on rank 0; on other ranks every method returns at once, so callers need no condition."""

    def __init__(self, config: Config, rank: int, start_step: int) -> None:
        self.is_writer = rank == 0
        self.folder = Path(config.checkpoint.dir)
        self.metrics_path = self.folder / "metrics.jsonl"
        if not self.is_writer:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "config.json", to_json(config))
        self._drop_lines_after(start_step)
        self.metrics_file = self.metrics_path.open("a", buffering=1)
        self.tensorboard = None
        if config.logging.tensorboard:
            self.tensorboard = SummaryWriter(str(self.folder / "tb"), purge_step=start_step + 1 if start_step else None)
        self.progress = tqdm(
            total=config.training.steps,
            initial=start_step,
            unit="step",
            desc="train",
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def _drop_lines_after(self, step: int) -> None:
        """A resumed run repeats the steps after its checkpoint; their old lines go."""
        if self.metrics_path.exists():
            lines = self.metrics_path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_atomically(self.metrics_path, "".join(kept))

    def step_done(self) -> None:
        if self.is_writer:
            self.progress.update(1)

    def log(self, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl and the same numbers in TensorBoard; the bar shows loss and speed."""
        if not self.is_writer:
            return
        self.metrics_file.write(json.dumps(metrics) + "\n")
        step = metrics["step"]
        if self.tensorboard is not None:
            for name, value in metrics.items():
                if name != "step" and value is not None:
                    self.tensorboard.add_scalar(f"train/{name}", value, step)
        shown = {"loss": f"{metrics['loss']:.3f}", "tokens/s": f"{metrics['tokens_per_s']:,.0f}"}
        self.progress.set_postfix(shown, refresh=False)

    def log_validation(self, step: int, loss: float, perplexity: float) -> None:
        """A line of its own kind in metrics.jsonl, with the step it belongs to."""
        if not self.is_writer:
            return
        self.metrics_file.write(json.dumps({"step": step, "valid_loss": loss, "valid_perplexity": perplexity}) + "\n")
        if self.tensorboard is not None:
            self.tensorboard.add_scalar("valid/loss", loss, step)
            self.tensorboard.add_scalar("valid/perplexity", perplexity, step)
        self.say(f"step {step}: validation loss {loss:.4f}, perplexity {perplexity:.2f}")

    def log_save(self, figures: dict[str, float]) -> None:
        """A line of its own kind for a completed checkpoint: step, save_blocked_seconds, save_seconds, save_bytes."""
        if not self.is_writer:
            return
        self.metrics_file.write(json.dumps(figures) + "\n")
        if self.tensorboard is not None:
            for name, value in figures.items():
                if name != "step":
                    self.tensorboard.add_scalar(f"checkpoint/{name}", value, int(figures["step"]))

    def log_codes(self, step: int, figures: LowBitFigures, histograms: Tensor, first_code: int) -> None:
        """Per matrix: a histogram of its codes; per figure: its spread over the matrices and one curve a matrix."""
        if not self.is_writer or self.tensorboard is None:
            return
        for column, figure in enumerate(FIGURES):
            self.tensorboard.add_histogram(f"low_bit/{figure}", figures.per_matrix[:, column], step)
        for row, name in enumerate(figures.names):
            for column, figure in enumerate(FIGURES):
                self.tensorboard.add_scalar(f"{figure}/{name}", float(figures.per_matrix[row, column]), step)
            self._add_code_histogram(f"codes/{name}", histograms[row], first_code, step)

    def _add_code_histogram(self, tag: str, counts: Tensor, first_code: int, step: int) -> None:
        assert self.tensorboard is not None
        codes = [first_code + i for i in range(len(counts))]
        values = counts.double()
        grid = values.new_tensor([float(code) for code in codes])
        self.tensorboard.add_histogram_raw(
            tag,
            min=codes[0],
            max=codes[-1],
            num=int(counts.sum()),
            sum=float((values * grid).sum()),
            sum_squares=float((values * grid.square()).sum()),
            bucket_limits=[code + 0.5 for code in codes],
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.is_writer:
            self.progress.write(text)

    def losses(self) -> list[float]:
        """Losses of all logged steps of the run, those before a resume too."""
        lines = [json.loads(line) for line in self.metrics_path.read_text().splitlines()]
        return [metrics["loss"] for metrics in lines if "loss" in metrics]

    def write_summary(self, summary: dict[str, Any]) -> None:
        if self.is_writer:
            write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        if self.is_writer:
            self.progress.close()
            self.metrics_file.close()
            if self.tensorboard is not None:
                self.tensorboard.close()
