"""The training loop: build, resume, step until done, evaluate, record, save.

`step.train_step` runs one step. This file says what happens between steps, and how often.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dqt_dist.checkpoint import store
from dqt_dist.checkpoint.folder import RECENT_LOSSES, complete_checkpoints
from dqt_dist.checkpoint.run_tokenizer import TOKENIZER_SHA256
from dqt_dist.config import Config, ProcessGrid, process_grid
from dqt_dist.data.dataset import build_datasets
from dqt_dist.data.indexed import check_tokenizer
from dqt_dist.data.loader import Loader
from dqt_dist.errors import RUN_ERROR_EXIT_CODE, RunError, told
from dqt_dist.launch import Launch
from dqt_dist.layers.build import build_model
from dqt_dist.optim.engine import build_engine
from dqt_dist.optim.loss_spikes import losses_of, new_window
from dqt_dist.parallel.groups import Groups, finalize, initialize
from dqt_dist.plan.arithmetic import flops_per_token
from dqt_dist.training import cost
from dqt_dist.training.cuda_graph import choose_forward_backward
from dqt_dist.training.curves import check_wandb
from dqt_dist.training.health import unhealthy
from dqt_dist.training.low_bit_metrics import LowBitMetricsCollector
from dqt_dist.training.profile import StepProfiler
from dqt_dist.training.recorder import Recorder
from dqt_dist.training.replay import Replay
from dqt_dist.training.replica_check import check_replicas
from dqt_dist.training.run_folder import only_writer, set_aside_other_course
from dqt_dist.training.step import Batch, StepResult, evaluate, mean_over_data, train_step
from dqt_dist.training.stop import StopSignal
from dqt_dist.training.summary import read_summary
from dqt_dist.training.watchdog import Watchdog

DIVERGED_BY = 1.0
"""Nats per token above the loss of a uniform guess, ln(vocab_size), from which a run counts as diverged. The first
steps of a run lie a few hundredths above that loss."""


class _Stopped(Exception):
    """A signal came to some rank, and all ranks know. Raised between steps, on all ranks."""


def train(config: Config, launch: Launch, resume: str, stop: StopSignal) -> dict[str, Any] | None:
    """Trains as the config says, on this rank. `resume` is "auto", "none" or a path.

    Returns the summary of a finished run; the summary of rank 0 is the one to show. Returns None when a signal stopped
    the run after its state was saved. Raises UserError for wrong data or checkpoints, RunError for a run that cannot go
    on. Raises SystemExit where another rank is the one that failed, and the message is printed.
    """
    with stop.while_ranks_meet():
        groups = initialize(config, launch)
    watchdog = Watchdog(config, launch)
    try:
        with only_writer(config):
            checkpoint = store.find(config, resume)
            summary = summary_of_complete_run(config, resume, store.start_of(checkpoint).step)
            if summary is None:
                summary = Trainer(config, groups, checkpoint, stop, watchdog).run()
        watchdog.close()
        dist.barrier()  # an earlier end of rank 0 would look like a failure to the watchdogs of other ranks
        stop.ignore() if summary is None else stop.restore()
        return summary
    except _Stopped:
        watchdog.close()
        dist.barrier()
        stop.ignore()
        if launch.rank == 0:
            print("stopped by a signal before the first step; there was nothing to save", flush=True)
        return None
    except Exception as error:
        message = told(error)
        if message is not None and not message.local:
            watchdog.close()
            raise
        # From now on the watchdog ends this process, should it not end by itself.
        if message is not None:
            watchdog.failed(message)
            raise SystemExit(message.exit_code) from None
        if not watchdog.failed(error):
            raise SystemExit(RUN_ERROR_EXIT_CODE) from None
        raise
    finally:
        finalize()


def agree(*values: int) -> list[int]:
    """The largest of every rank's values, on every rank. A collective call that does not wait for a GPU."""
    largest = torch.tensor([int(value) for value in values])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def summary_of_complete_run(config: Config, resume: str, step: int) -> dict[str, Any] | None:
    """The contents of summary.json, on all ranks, when `--resume auto` finds no step to make after `step`. A collective
    call."""
    found: list[Any] = [None]
    if dist.get_rank() == 0 and resume == "auto" and step >= config.training.steps:
        summary = read_summary(Path(config.checkpoint.dir))
        if summary is not None and summary["steps"] == step:
            found = [summary]
            print(f"{config.checkpoint.dir}: complete since step {step}; training.steps above {step} goes on")
    dist.broadcast_object_list(found, src=0)
    return found[0]


class Trainer:
    """One run on this rank. Holds the parts of the run and sequences what happens between steps."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        checkpoint: store.Checkpoint | None,
        stop: StopSignal,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.groups, self.stop, self.watchdog = config, groups, stop, watchdog
        self.process_grid: ProcessGrid = process_grid(config, groups.world.size())
        check_wandb(config)
        self.tokenizer = check_tokenizer(config.data.tokenizer, config.model.vocab_size)
        store.check_tokenizer_of(checkpoint, self.tokenizer)
        self.progress = store.start_of(checkpoint)
        self.start_step = self.step
        self._start_up_phase("preparing the data")
        self.train_loader, self.valid_loader, self.valid_text_loaders = build_loaders(config, groups, self.progress)
        self._start_up_phase("building the model")
        self.model_chunks = build_model(config, groups)
        self.engine = build_engine(self.model_chunks, config, groups)
        self.optimizer = self.engine.optimizer
        self.forward_backward = choose_forward_backward(self.model_chunks, self.optimizer, config, groups)
        self.replay = None
        if config.training.replay_suspicious_steps:
            self.replay = Replay(self.forward_backward, self.model_chunks, self.optimizer, groups)
            self.forward_backward = self.replay.run
        run, rank = Path(config.checkpoint.dir), groups.world.rank()
        self.profiler = StepProfiler(config.logging.profile_steps, run, rank, groups.device)
        self.low_bit_metrics = LowBitMetricsCollector(self.optimizer.low_bit, config, groups)
        self._start_up_phase("loading the checkpoint")
        if checkpoint is not None:
            store.load(checkpoint, self.model_chunks, self.optimizer, config)
            if config.training.spike_deviations is not None:
                losses = checkpoint.manifest.get(RECENT_LOSSES, [])
                self.optimizer.loss_window = new_window(config.training.spike_window, losses, groups.device)
        self._start_up_phase("opening the run folder")
        self.checkpoint_writer = store.open_writer(config)
        left = set_aside_other_course(config, checkpoint)
        self.recorder = Recorder(config, self.tokenizer, groups.world.rank(), self.step)
        if left is not None:
            self.recorder.say(f"what an earlier course left in {config.checkpoint.dir} is set aside as {left}")
        if checkpoint is not None:
            for line in store.set_aside(config, checkpoint):
                self.recorder.say(line)
            self.recorder.say(f"resumed from {checkpoint.path} at step {self.step}")
        self.peak = cost.peak_flops(config, groups)
        self.valid_loss, self.valid_text_losses = math.nan, dict[str, float]()
        # A checkpoint of another run is saved here too, also by a run that has no step left to make.
        self.saved_step = self.step if checkpoint is None or store.is_own(config, checkpoint) else -1
        self.logged_skipped_steps = 0
        self.said_unhealthy = False
        self.clock, self.clock_step, self.training_seconds = time.perf_counter(), self.step, 0.0

    def _start_up_phase(self, name: str) -> None:
        self._stop_if_asked()
        self.watchdog.mark(name, self.step, slow=True)

    def _stop_if_asked(self) -> None:
        """Raises _Stopped on all ranks when a signal came to one. A collective call."""
        if any(agree(self.stop.received)):
            raise _Stopped

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
        # Modules and optimizer live as long as the run. Frozen, they cost the garbage collector no time; otherwise it
        # walks them again and again, which takes 15 ms per step of a 1.36 B model.
        gc.collect()
        gc.freeze()
        batches = self.train_loader.iterate(self.progress.samples)
        try:
            self._make_up_for_validation()
            while self.step < self.config.training.steps:
                first = self.step == self.start_step
                self.watchdog.mark("reading a batch", self.step + 1, slow=first)
                batch = next(batches)
                self.watchdog.mark("training", self.step + 1, slow=first)
                with self.profiler.step(self.step + 1):
                    result = train_step(self.engine, self.model_chunks, batch, self.forward_backward)
                self._advance()
                self._after_step(result)
            return self._finish()
        except _Stopped:
            if self.profiler.running is not None:
                self._write_trace()
            self._save_if_trained()
            self._wait_for_save()
            self.recorder.say(f"stopped by a signal after step {self.step}; --resume auto goes on from there")
            return None
        finally:
            gc.unfreeze()
            batches.close()
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
        training, checkpoint = self.config.training, self.config.checkpoint
        self.watchdog.mark("between steps", self.step)
        self.recorder.step_done()
        if self.replay is not None and self.replay.repeated:
            self.recorder.say(self._why_it_was_skipped(result))
        asked_to_stop, skipped = agree(self.stop.received, int(self.optimizer.skipped_in_a_row_on_host))
        if training.replica_check_interval and self.step % training.replica_check_interval == 0:
            self._check_replicas()
        if self.config.shows_metrics(self.step):
            self._log(result)
        if self.profiler.is_complete:
            self._write_trace()
        if skipped >= training.max_skipped_steps:
            raise RunError(self._why_too_many_are_skipped(skipped, result))
        # A stop waits for a step that is not skipped, so that there is something to save.
        if asked_to_stop and not self.optimizer.skipped_in_a_row:
            raise _Stopped
        if self.config.shows_codes(self.step):
            self._log_codes()
        if self._validation_is_due():
            self._validate()
        if checkpoint.interval and self.step % checkpoint.interval == 0 and self.step < training.steps:
            self._save_if_trained()
        self._record_saves()

    def _why_it_was_skipped(self, result: StepResult) -> str:
        last = self.progress.samples - 1
        return (
            f"step {self.step}: skipped (loss {float(self.optimizer.mean_loss):.4g}, gradient norm "
            f"{float(result.grad_norm):.4g}); executed again it gave the same bits on every rank, so the reason is the "
            f"data, samples {last + 1 - self.config.training.global_batch_size} to {last}, or the weights, and not the "
            f"hardware"
        )

    def _why_too_many_are_skipped(self, skipped: int, result: StepResult) -> str:
        deviations = self.config.training.spike_deviations
        spike = "" if deviations is None else f", or a loss {deviations:g} deviations above those before"
        newest = complete_checkpoints(store.checkpoints_folder(self.config))
        return (
            f"training.max_skipped_steps: {skipped} steps in a row up to step {self.step} had a loss or gradients that "
            f"are not finite{spike} (loss {float(mean_over_data(result.loss, self.groups)):.4g}, gradient norm "
            f"{float(result.grad_norm):.4g}, optimizer.learning_rate {result.rates.learning_rate:.4g}); the newest "
            f"checkpoint is {newest[-1].name if newest else 'none'}, as before"
        )

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
        tokens_per_second = self.tokens_per_step / seconds
        skipped_steps = int(self.optimizer.skipped_steps)
        code_metrics = self.low_bit_metrics.collect().overall if self.optimizer.low_bit.enabled else {}
        flops = flops_per_token(self.config.model, self.config.data.document_masking) * tokens_per_second
        self.recorder.log(
            {
                "step": self.step,
                "loss": float(mean_over_data(result.loss, self.groups)),
                "grad_norm": float(result.grad_norm),
                "skipped_steps": skipped_steps - self.logged_skipped_steps,
                "lr": result.rates.learning_rate,
                "low_bit_lr": result.rates.low_bit_learning_rate,
                "tokens": self.progress.tokens,
                "tokens_per_s": tokens_per_second,
                "tflops_per_s": flops / self.groups.world.size() / 1e12,
                "mfu": flops / self.peak.flops,
                "peak_memory_bytes": cost.peak_memory_bytes(self.groups),
                **cost.sent_bytes(self.step - self.clock_step),
                **code_metrics,
            }
        )
        self.logged_skipped_steps = skipped_steps
        if code_metrics and not self.said_unhealthy:
            for line in unhealthy(code_metrics, result.rates, self.config):
                self.recorder.say(f"warning: step {self.step}: {line} (docs/tuning.md)")
                self.said_unhealthy = True
        self._start_clock()

    def _write_trace(self) -> None:
        self.watchdog.mark("writing a trace", self.step, slow=True)
        self._stop_clock()
        where = self.profiler.write()
        if where is not None:
            self.recorder.say(where)
        self.watchdog.mark("between steps", self.step)
        self._start_clock()

    def _log_codes(self) -> None:
        if not self.optimizer.low_bit.enabled:
            return
        self._stop_clock()
        grid = self.optimizer.low_bit.grid
        self.recorder.log_codes(
            self.step, self.low_bit_metrics.collect(), self.low_bit_metrics.code_histograms(grid), grid.qmin
        )
        self._start_clock()

    def _validation_is_due(self) -> bool:
        training = self.config.training
        return bool(training.eval_interval) and self.step % training.eval_interval == 0 and self.step < training.steps

    def _make_up_for_validation(self) -> None:
        """Validates after a resume where a signal had ended the validation of this step. A collective call."""
        if self.step > 0 and self._validation_is_due():
            missing = self.recorder.is_writer and not self.recorder.has_validation(self.step)
            if any(agree(missing)):
                self._validate()

    def _validation_batches(self, loader: Loader) -> Iterator[list[Batch]]:
        """The batches of a validation. Between them all ranks see whether a signal came."""
        for batch in loader.iterate():
            self._stop_if_asked()
            self.watchdog.mark("validation", self.step)
            yield batch

    def _validate(self) -> None:
        def loss_on(loader: Loader) -> float:
            return evaluate(self.model_chunks, self._validation_batches(loader), self.config, self.groups)

        self._stop_clock()
        self.valid_loss = loss_on(self.valid_loader)
        self.valid_text_losses = {name: loss_on(loader) for name, loader in self.valid_text_loaders.items()}
        perplexity = math.exp(min(self.valid_loss, 700.0))
        self.recorder.log_validation(self.step, self.valid_loss, perplexity, self.valid_text_losses)
        self._start_clock()

    def _save_if_trained(self) -> None:
        """Saves, unless the last step was skipped: the weights may be the reason for it."""
        if self.optimizer.skipped_in_a_row:
            self.recorder.say(f"step {self.step}: skipped, so no checkpoint is made of it")
        else:
            self._save()

    def _save(self) -> None:
        if self.step == self.saved_step:
            return
        if self.config.training.replica_check_interval:
            self._check_replicas()  # no checkpoint of a run whose replicas differ
        self.watchdog.mark("saving", self.step, slow=True)
        self._stop_clock()
        provenance = {
            "layout": asdict(self.process_grid),
            "versions": cost.versions(),
            TOKENIZER_SHA256: self.tokenizer.sha256,
            RECENT_LOSSES: losses_of(self.optimizer.loss_window),
        }
        store.save(self.checkpoint_writer, self.model_chunks, self.optimizer, self.config, self.progress, provenance)
        self.saved_step = self.step
        self.watchdog.mark("between steps", self.step)
        self._start_clock()

    def _check_replicas(self) -> None:
        try:
            check_replicas(self.model_chunks, self.optimizer, self.groups, self.step)
        except RunError as error:
            if self.replay is None:
                raise
            raise RunError(f"{error}\n{self.replay.after_failed_replica_check()}") from None

    def _wait_for_save(self) -> None:
        self.watchdog.mark("saving", self.step, slow=True)
        self.checkpoint_writer.wait()
        self._record_saves()

    def _record_saves(self) -> None:
        """Records the saves that have completed since the last call."""
        for saved in self.checkpoint_writer.take_finished():
            self.recorder.log_save(saved.numbers())
            took = f"{saved.save_bytes / 1e6:,.1f} MB in {saved.save_seconds:.1f} s"
            self.recorder.say(
                f"step {saved.step}: saved {saved.path}, {took}, training waited {saved.save_blocked_seconds:.1f} s"
            )
            for warning in saved.warnings:
                self.recorder.say(warning)

    def _finish(self) -> dict[str, Any]:
        self._validate()
        if not math.isfinite(self.valid_loss):
            raise RunError(f"the validation loss is {self.valid_loss} at step {self.step}; no checkpoint is made of it")
        self._save()
        self._wait_for_save()
        summary = self._summary()
        self.recorder.write_summary(summary)
        return summary

    def _summary(self) -> dict[str, Any]:
        """The contents of summary.json. A collective call."""
        total, low_bit = cost.count_parameters(self.model_chunks, self.optimizer.low_bit, self.groups)
        breakdown = cost.low_bit_bytes(self.optimizer.low_bit)
        # Only the writer has metrics.jsonl. The summaries of other ranks are not shown.
        column = self.recorder.column if self.recorder.is_writer else lambda _: [0.0]
        losses, steps_here = column("loss"), self.step - self.start_step
        speed = next(reversed(column("tokens_per_s")), None)
        if steps_here:  # a run that was stopped in its last validation makes no step here
            speed = steps_here * self.tokens_per_step / self.training_seconds
        uniform_loss = math.log(self.config.model.vocab_size)
        return {
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "valid_loss": self.valid_loss,
            "valid_perplexity": math.exp(min(self.valid_loss, 700.0)),
            "valid_text_losses": self.valid_text_losses,
            "uniform_loss": uniform_loss,
            "diverged": self.valid_loss > uniform_loss + DIVERGED_BY,
            "skipped_steps": sum(column("skipped_steps")),
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


def build_loaders(config: Config, groups: Groups, start: store.Progress) -> tuple[Loader, Loader, dict[str, Loader]]:
    """Loaders of the training set, the validation set and data.valid_texts of a run that begins at `start`.

    Raises UserError for files that are missing or do not fit the config.
    """
    training, data = config.training, config.data
    blends = {field: [(source.path, source.weight) for source in blend] for field, blend in data.blends.items()}
    datasets = build_datasets(
        train=blends["data.train"],
        valid=blends.get("data.valid"),
        valid_texts={name: blends[f"data.valid_texts.{name}"] for name in data.valid_texts},
        valid_fraction=data.valid_fraction,
        sequence_length=config.model.seq_length,
        vocab_size=config.model.vocab_size,
        tokenizer_path=data.tokenizer,
        document_masking=data.document_masking,
        seed=training.seed,
        # Samples before a resume may have been consumed in global batches of another size.
        num_train_samples=start.samples + max(0, training.steps - start.step) * training.global_batch_size,
        num_valid_samples=training.eval_batches * training.global_batch_size,
        cache_dir=config.data_index_folder,
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

    texts = {name: loader(dataset, 0) for name, dataset in datasets.valid_texts.items()}
    return loader(datasets.train, data.num_workers), loader(datasets.valid, 0), texts
