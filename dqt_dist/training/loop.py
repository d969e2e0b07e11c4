"""The training loop: build, resume, step until done, evaluate, record, save.

`step.train_step` runs one step. This file says what happens between steps, and how often.
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from dqt_dist.checkpoint import store
from dqt_dist.config import Config, ProcessGrid, process_grid
from dqt_dist.data.dataset import build_datasets
from dqt_dist.data.loader import Loader
from dqt_dist.errors import RunError
from dqt_dist.launch import Launch
from dqt_dist.layers.build import build_model
from dqt_dist.optim.engine import build_engine
from dqt_dist.parallel.groups import Groups, finalize, initialize
from dqt_dist.training import cost
from dqt_dist.training.cuda_graph import choose_forward_backward
from dqt_dist.training.low_bit_metrics import LowBitMetricsCollector
from dqt_dist.training.recorder import Recorder
from dqt_dist.training.replica_check import check_replicas
from dqt_dist.training.step import StepResult, evaluate, mean_over_data, train_step
from dqt_dist.training.stop import StopSignal


def train(config: Config, launch: Launch, resume: str) -> dict[str, Any] | None:
    """Trains as the config says, on this rank. `resume` is "auto", "none" or a path.

    Returns the summary of a finished run; the summary of rank 0 is the one to show. Returns None when a signal stopped
    the run after its state was saved. Raises UserError for wrong data or checkpoints.
    """
    groups = initialize(config, launch)
    try:
        return Trainer(config, groups, resume).run()
    finally:
        finalize()


class Trainer:
    """One run on this rank. Holds the parts of the run and sequences what happens between steps."""

    def __init__(self, config: Config, groups: Groups, resume: str) -> None:
        self.config, self.groups = config, groups
        self.process_grid: ProcessGrid = process_grid(config, groups.world.size())
        checkpoint = store.find(config, resume)
        self.progress = store.start_of(checkpoint)
        self.train_loader, self.valid_loader = build_loaders(config, groups, self.progress)
        self.model_chunks = build_model(config, groups)
        self.engine = build_engine(self.model_chunks, config, groups)
        self.optimizer = self.engine.optimizer
        self.forward_backward = choose_forward_backward(self.model_chunks, self.optimizer, config, groups)
        self.low_bit_metrics = LowBitMetricsCollector(self.optimizer.low_bit, config, groups)
        if checkpoint is not None:
            store.load(checkpoint, self.model_chunks, self.optimizer, config)
        self.checkpoint_writer = store.open_writer(config)
        self.recorder = Recorder(config, groups.world.rank(), self.step)
        if checkpoint is not None:
            self.recorder.say(f"resumed from {checkpoint} at step {self.step}")
            for path in store.set_aside_newer(config, checkpoint):
                self.recorder.say(f"a later checkpoint is set aside as {path}")
        self.peak = cost.peak_flops(config, groups)
        self.last_loss, self.valid_loss, self.tokens_per_second = math.nan, math.nan, 0.0
        self.saved_step = self.step if checkpoint is not None else -1
        self.clock, self.clock_step, self.training_seconds = time.perf_counter(), self.step, 0.0
        self.start_step = self.step

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.global_batch_size * self.config.model.seq_length

    def run(self) -> dict[str, Any] | None:
        """Runs from the current step to the last, then validates, saves and returns the summary.

        Returns None when a signal stopped the run.
        """
        training = self.config.training
        stop = StopSignal()
        # Modules and optimizer live as long as the run. Frozen, they cost the garbage collector no time; otherwise it
        # walks them again and again, which takes 15 ms per step of a 1.36 B model.
        gc.collect()
        gc.freeze()
        try:
            batches = self.train_loader.iterate(self.progress.samples)
            while self.step < training.steps:
                result = train_step(self.engine, self.model_chunks, next(batches), self.forward_backward)
                self._advance()
                self._after_step(result)
                if stop.agreed() and self.step < training.steps:
                    self._save()
                    self._wait_for_save()
                    stop.ignore()
                    self.recorder.say(f"stopped by a signal after step {self.step}; --resume auto goes on from there")
                    return None
            summary = self._finish()
            stop.restore()
            return summary
        finally:
            gc.unfreeze()
            # A checkpoint write in flight is finished even when a later step has failed.
            self.checkpoint_writer.close()
            self.recorder.close()

    def _advance(self) -> None:
        progress = self.progress
        samples = self.config.training.global_batch_size
        self.progress = store.Progress(
            progress.step + 1, progress.tokens + self.tokens_per_step, progress.samples + samples
        )

    def _after_step(self, result: StepResult) -> None:
        logging, training, checkpoint = self.config.logging, self.config.training, self.config.checkpoint
        self.recorder.step_done()
        if training.replica_check_interval and self.step % training.replica_check_interval == 0:
            self._check_replicas()
        if self.step % logging.interval == 0 or self.step in (1, training.steps):
            self._log(result)
        if self.step % logging.histogram_interval == 0:
            self._log_codes()
        if training.eval_interval and self.step % training.eval_interval == 0 and self.step < training.steps:
            self._validate()
        if checkpoint.interval and self.step % checkpoint.interval == 0 and self.step < training.steps:
            self._save()
        self._record_saves()

    def _stop_clock(self) -> float:
        """Seconds per step since the clock was started. Validation and saving are not counted."""
        if self.groups.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, steps = time.perf_counter() - self.clock, self.step - self.clock_step
        self.training_seconds += seconds
        return seconds / max(1, steps)

    def _start_clock(self) -> None:
        self.clock, self.clock_step = time.perf_counter(), self.step
        cost.reset_sent_bytes()

    def _log(self, result: StepResult) -> None:
        """Writes one line of metrics. Only here numbers of a step are copied to the host."""
        seconds = self._stop_clock()
        self.tokens_per_second = self.tokens_per_step / seconds
        self.last_loss = float(mean_over_data(result.loss, self.groups))
        code_metrics = self.low_bit_metrics.collect().overall if self.optimizer.low_bit.enabled else {}
        flops = cost.flops_per_token(self.config.model) * self.tokens_per_second
        self.recorder.log(
            {
                "step": self.step,
                "loss": self.last_loss,
                "grad_norm": float(result.grad_norm),
                "lr": result.rates.learning_rate,
                "low_bit_lr": result.rates.low_bit_learning_rate,
                "tokens": self.progress.tokens,
                "tokens_per_s": self.tokens_per_second,
                "mfu": flops / self.peak.flops,
                "peak_memory_bytes": cost.peak_memory_bytes(self.groups),
                **cost.sent_bytes(self.step - self.clock_step),
                **code_metrics,
            }
        )
        if not math.isfinite(self.last_loss):
            raise RunError(f"the loss is {self.last_loss} at step {self.step}; no checkpoint was written after it")
        self._start_clock()

    def _log_codes(self) -> None:
        if not self.optimizer.low_bit.enabled or not self.config.logging.tensorboard:
            return
        self._stop_clock()
        grid = self.optimizer.low_bit.grid
        self.recorder.log_codes(
            self.step, self.low_bit_metrics.collect(), self.low_bit_metrics.code_histograms(grid), grid.qmin
        )
        self._start_clock()

    def _validate(self) -> None:
        self._stop_clock()
        self.valid_loss = evaluate(self.model_chunks, self.valid_loader.iterate(), self.config, self.groups)
        self.recorder.log_validation(self.step, self.valid_loss, math.exp(min(self.valid_loss, 700.0)))
        self._start_clock()

    def _save(self) -> None:
        if self.step == self.saved_step:
            return
        if self.config.training.replica_check_interval:
            self._check_replicas()  # no checkpoint of a run whose replicas differ
        self._stop_clock()
        provenance = {"layout": asdict(self.process_grid), "versions": cost.versions()}
        store.save(self.checkpoint_writer, self.model_chunks, self.optimizer, self.config, self.progress, provenance)
        self.saved_step = self.step
        self._start_clock()

    def _check_replicas(self) -> None:
        check_replicas(self.model_chunks, self.optimizer, self.groups, self.step)

    def _wait_for_save(self) -> None:
        self.checkpoint_writer.wait()
        self._record_saves()

    def _record_saves(self) -> None:
        """Records the saves that have completed since the last call."""
        for saved in self.checkpoint_writer.take_finished():
            self.recorder.log_save({name: value for name, value in asdict(saved).items() if name != "path"})
            took = f"{saved.save_bytes / 1e6:,.1f} MB in {saved.save_seconds:.1f} s"
            self.recorder.say(
                f"step {saved.step}: saved {saved.path}, {took}, training waited {saved.save_blocked_seconds:.1f} s"
            )

    def _finish(self) -> dict[str, Any]:
        self._validate()
        self._save()
        self._wait_for_save()
        summary = self._summary()
        self.recorder.write_summary(summary)
        return summary

    def _summary(self) -> dict[str, Any]:
        """The contents of summary.json. A collective call."""
        total, low_bit = cost.count_parameters(self.model_chunks, self.optimizer.low_bit, self.groups)
        breakdown = cost.low_bit_bytes(self.optimizer.low_bit)
        # Only the writer has metrics.jsonl. The summaries of other ranks are not used.
        losses = self.recorder.losses() if self.recorder.is_writer else [math.nan]
        steps_here = self.step - self.start_step
        speed = steps_here * self.tokens_per_step / self.training_seconds if steps_here else self.tokens_per_second
        return {
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "valid_loss": self.valid_loss,
            "valid_perplexity": math.exp(min(self.valid_loss, 700.0)),
            "steps": self.step,
            "tokens": self.progress.tokens,
            "tokens_per_s": speed,
            "parameters": total,
            "low_bit_parameters": low_bit,
            "static_bytes_per_low_bit_weight": sum(breakdown.values()) if breakdown else None,
            "static_bytes_breakdown": breakdown,
            "peak_memory_bytes": cost.peak_memory_bytes(self.groups),
            "peak_flops": asdict(self.peak),
            "layout": asdict(self.process_grid)
            | {"sequence": self.config.parallel.sequence, "zero_stage": self.config.zero_stage},
            "versions": cost.versions(),
        }


def build_loaders(config: Config, groups: Groups, start: store.Progress) -> tuple[Loader, Loader]:
    """Loaders of the training set and the validation set of a run that begins at `start`.

    Raises UserError for files that are missing or do not fit the config.
    """
    training, data = config.training, config.data
    train_set, valid_set = build_datasets(
        train=[(source.path, source.weight) for source in data.train],
        valid=None if data.valid is None else [(source.path, source.weight) for source in data.valid],
        valid_fraction=data.valid_fraction,
        sequence_length=config.model.seq_length,
        vocab_size=config.model.vocab_size,
        tokenizer_path=data.tokenizer,
        seed=training.seed,
        # Samples before a resume may have been consumed in global batches of another size.
        num_train_samples=start.samples + max(0, training.steps - start.step) * training.global_batch_size,
        num_valid_samples=training.eval_batches * training.global_batch_size,
        cache_dir=f"{config.checkpoint.dir}/data_index",
        build_here=groups.local_rank == 0,
        barrier=dist.barrier,
    )

    def loader(dataset: Any, num_workers: int) -> Loader:
        return Loader(
            dataset,
            micro_batch_size=training.micro_batch_size,
            global_batch_size=training.global_batch_size,
            data_parallel_rank=groups.data.rank(),
            data_parallel_size=groups.data.size(),
            num_workers=num_workers,
            pin_memory=groups.device.type == "cuda",
        )

    return loader(train_set, data.num_workers), loader(valid_set, 0)
