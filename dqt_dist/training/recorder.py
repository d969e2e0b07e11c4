"""What a run records: metrics.jsonl, TensorBoard, the progress bar, summary.json. Only rank 0 writes.

A run folder:

    config.json       the complete config            metrics.jsonl   one line per logged step
    tb/               TensorBoard                    checkpoints/    step_NNNNNNNN
    tokenizer.model   data.tokenizer, or .json       summary.json    at the end
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from dqt_dist.config import Config, to_json
from dqt_dist.data.tokenizer import Tokenizer, drop_other_tokenizer
from dqt_dist.errors import naming
from dqt_dist.progress_line import ProgressLine
from dqt_dist.training.curves import TensorBoard, WeightsAndBiases
from dqt_dist.training.low_bit_metrics import LowBitMetrics
from dqt_dist.training.metrics_file import METRICS_FILE, read_lines
from dqt_dist.training.summary import SUMMARY


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the file in one rename: a reader sees the old file or the new file, never a part of one."""
    partial = path.with_name(f".{path.name}.partial")
    with naming(partial), open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


class Recorder:
    """Writes on rank 0. On other ranks every method returns at once, so callers need no condition."""

    def __init__(self, config: Config, tokenizer: Tokenizer, rank: int, start_step: int) -> None:
        self.is_writer = rank == 0
        self.folder = Path(config.checkpoint.dir)
        self.metrics_path = self.folder / METRICS_FILE
        if not self.is_writer:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "config.json", to_json(config))
        write_atomically(self.folder / tokenizer.file_name, tokenizer.model)
        drop_other_tokenizer(self.folder, tokenizer)
        damaged = self._drop_lines_after(start_step)
        self.metrics_file = self.metrics_path.open("a", buffering=1)
        self.tensorboard = None
        if config.logging.tensorboard:
            self.tensorboard = TensorBoard(self.folder / "tb", start_step + 1)
        steps = config.training.steps
        self.wandb = WeightsAndBiases(config) if config.logging.wandb_project is not None else None
        self.progress = ProgressLine(desc="train", total=steps, initial=start_step, unit="step", mininterval=0.5)
        if damaged:
            self.say(f"warning: {damaged} lines of {self.metrics_path} are damaged and left out")

    def _drop_lines_after(self, step: int) -> int:
        """Deletes the lines of steps after `step`, which a resumed run repeats, and damaged ones; returns their number.

        A run that was killed may leave a part of a line.
        """
        if not self.metrics_path.exists():
            return 0
        lines, damaged = read_lines(self.folder)
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
        write_atomically(self.metrics_path, "".join(kept))
        return damaged

    def _record(self, metrics: dict[str, Any]) -> None:
        """Writes one line of metrics.jsonl, and the same numbers as curves."""
        with naming(self.metrics_path):
            self.metrics_file.write(json.dumps(metrics) + "\n")
        numbers = {name: value for name, value in metrics.items() if name != "step" and value is not None}
        for curves in (self.tensorboard, self.wandb):
            if curves is not None:
                curves.add_numbers(metrics["step"], numbers)

    def step_done(self) -> None:
        if self.is_writer and self.progress.is_live:
            self.progress.update(1)

    def log(self, metrics: dict[str, Any]) -> None:
        """Records a step. The live line shows loss and speed; without one they are a plain line."""
        if not self.is_writer:
            return
        self._record(metrics)
        loss, speed = f"{metrics['loss']:.3f}", f"{metrics['tokens_per_s']:,.0f}"
        if self.progress.is_live:
            self.progress.set_postfix({"loss": loss, "tokens/s": speed}, refresh=False)
        else:
            self.say(f"step {metrics['step']} of {self.progress.total}: loss {loss}, {speed} tokens/s")

    def log_validation(self, step: int, loss: float, perplexity: float, text_losses: dict[str, float]) -> None:
        """Records a validation: step, valid_loss, valid_perplexity, and valid_loss.NAME of data.valid_texts."""
        if not self.is_writer:
            return
        of_texts = {f"valid_loss.{name}": value for name, value in text_losses.items()}
        self._record({"step": step, "valid_loss": loss, "valid_perplexity": perplexity, **of_texts})
        texts = "".join(f"; {name} {value:.4f}" for name, value in text_losses.items())
        self.say(f"step {step}: validation loss {loss:.4f}, perplexity {perplexity:.2f}{texts}")

    def log_save(self, metrics: dict[str, float]) -> None:
        """Records a save: step, save_blocked_seconds, save_seconds, save_bytes."""
        if self.is_writer:
            self._record(metrics)

    def log_codes(self, step: int, metrics: LowBitMetrics, histograms: Tensor, first_code: int) -> None:
        """Writes the figures of each matrix to TensorBoard."""
        if self.is_writer and self.tensorboard is not None:
            self.tensorboard.add_codes(step, metrics, histograms, first_code)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self.is_writer:
            self.progress.say(text)

    def column(self, name: str) -> list[Any]:
        """The values of `name` in all lines that have it, including steps before a resume; none where metrics.jsonl is
        gone."""
        return [line[name] for line in read_lines(self.folder)[0] if name in line]

    def has_validation(self, step: int) -> bool:
        return any(line.get("step") == step and "valid_loss" in line for line in read_lines(self.folder)[0])

    def write_summary(self, summary: dict[str, Any]) -> None:
        if self.is_writer:
            write_atomically(self.folder / SUMMARY, json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        if self.is_writer:
            self.progress.close()
            self.metrics_file.close()
            for curves in (self.tensorboard, self.wandb):
                if curves is not None:
                    curves.close()
