"""The folder of a run: one run writes there at a time, and it holds one course of training.

Both are the work of the first rank; what it raises is raised on every rank. Every function is a collective call.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from dqt_dist.checkpoint import store
from dqt_dist.checkpoint.collective import on_first_rank
from dqt_dist.command_line import as_typed
from dqt_dist.config import Config
from dqt_dist.data.tokenizer import kept_tokenizer
from dqt_dist.folder_lock import FolderLock

# What a course leaves; its checkpoints first, because --resume auto looks for them.
COURSE = ("checkpoints", "metrics.jsonl", "tb", "wandb", "traces", "summary.json", "config.json")


@contextlib.contextmanager
def only_writer(config: Config) -> Iterator[None]:
    """Holds the lock of the run folder. Raises UserError naming the run that has it."""
    with contextlib.ExitStack() as held:
        lock = FolderLock(Path(config.checkpoint.dir), as_typed("dqt-pretrain"))

        def take() -> None:
            held.enter_context(lock)

        on_first_rank(take)
        yield


def set_aside_other_course(config: Config, checkpoint: store.Checkpoint | None) -> Path | None:
    """Moves what an earlier course left in the run folder into a folder `left_run_N` there; None when there is nothing.

    A run from scratch or from a checkpoint of elsewhere begins a new course. Were the old checkpoints to stay, a later
    --resume auto would go on from them, and metrics of two courses would stand in one file.
    """
    run = Path(config.checkpoint.dir)
    if checkpoint is not None and store.is_own(config, checkpoint):
        return None

    def move() -> Path | None:
        there = [name for name in COURSE if (run / name).exists()]
        if not {"checkpoints", "metrics.jsonl", "tb"} & set(there):
            return None
        number = 1
        while (target := run / f"left_run_{number}").exists():
            number += 1
        target.mkdir()
        for name in there:
            (run / name).rename(target / name)
        if tokenizer := kept_tokenizer(run):  # it stays too: data.tokenizer may name it
            shutil.copyfile(tokenizer, target / tokenizer.name)
        return target

    return on_first_rank(move)
