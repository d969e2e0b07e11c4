"""Every layout loads what every other layout wrote: the same digest, and the next step goes on from it.

Seven layouts of (tensor, pipeline, data), data-parallel ones under ZeRO 1; 7 saves and 42 loads. The weights have
latents, whose scales are refitted in every step, so that all kinds of low-bit state are there. One engine a reading
layout loads the six checkpoints of the others one after the other, each over a state that has been trained away from
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from dqt_dist.checkpoint import store
from dqt_dist.checkpoint.digest import digest, digest_of
from dqt_dist.checkpoint.folder import Progress
from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.config import Config
from tests.checkpoint.test_store import progress_at, save
from tests.distributed import run_distributed
from tests.parallel.runs import Whole, fraction_of_codes_that_differ, start, whole_state

Layout = tuple[int, int, int]
LAYOUTS: list[Layout] = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
SAVED_STEP = 2
LATENTS = ["quantization.latent_bits=4", "quantization.scale_refit_interval=1", "optimizer.second_moment=factored"]


def overrides(layout: Layout) -> list[str]:
    tensor, pipeline, data = layout
    zero = ["deepspeed.zero_optimization.stage=1"] if data > 1 else []
    return [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", "optimizer.schedule=linear", *LATENTS, *zero]


def world_size(layout: Layout) -> int:
    return layout[0] * layout[1] * layout[2]


@dataclass
class Saved:
    """A checkpoint after two steps, and what the run that wrote it did next."""

    path: Path
    config: Config
    digest_in_memory: str
    next_state: Whole
    next_loss: float


@dataclass
class Loaded:
    """What one checkpoint became at another layout: itself saved again, and the step after it."""

    progress: Progress
    path: Path
    next_state: Whole
    next_loss: float


def write(rank: int, size: int, folder: str, *settings: str) -> Saved | None:
    run = start(*settings, f"checkpoint.dir={folder}")
    for step in range(1, SAVED_STEP + 1):
        run.step(step)
    in_memory = digest(whole_state(run).items(), progress_at(SAVED_STEP)).total if rank == 0 else whole_state(run)
    path = save(run, SAVED_STEP)
    next_loss = run.mean_loss(run.step(SAVED_STEP + 1))
    next_state = whole_state(run)
    return Saved(path, run.config, str(in_memory), next_state, next_loss) if rank == 0 else None


def read_each(rank: int, size: int, paths: list[str], folder: str, *settings: str) -> list[Loaded]:
    run = start(*settings, f"checkpoint.dir={folder}", f"checkpoint.keep_last={len(LAYOUTS)}")
    found = []
    for number, path in enumerate(paths):
        run.step(77)
        progress = store.load(store.opened(Path(path)), run.model_chunks, run.optimizer, run.config)
        again = save(run, progress.step).rename(f"{folder}/{number}") if rank == 0 else save(run, progress.step)
        next_loss = run.mean_loss(run.step(progress.step + 1))
        found.append(Loaded(progress, again, whole_state(run), next_loss))
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Saved]:
    """The checkpoint of each layout."""
    folder = tmp_path_factory.mktemp("written")
    saved = {}
    for layout in LAYOUTS:
        name = "_".join(map(str, layout))
        saved[layout] = run_distributed(write, world_size(layout), str(folder / name), *overrides(layout))[0]
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_loads_the_checkpoint_of_every_other_layout(
    checkpoints: dict[Layout, Saved], layout: Layout, tmp_path: Path
) -> None:
    others = [written for written in LAYOUTS if written != layout]
    paths = [str(checkpoints[written].path) for written in others]
    loaded = run_distributed(read_each, world_size(layout), paths, str(tmp_path), *overrides(layout))[0]
    for written, found in zip(others, loaded, strict=True):
        saved = checkpoints[written]
        assert found.progress == progress_at(SAVED_STEP)
        original, again = (digest_of(CheckpointReader(path)) for path in (saved.path, found.path))
        assert again.parts == original.parts, written
        assert original.total == saved.digest_in_memory
        # The next step adds up in another order (test_step.py), and fp32 keeps 24 bits of every product.
        assert found.next_loss == pytest.approx(saved.next_loss, rel=1e-6), written
        assert fraction_of_codes_that_differ(found.next_state, saved.next_state, saved.config) <= 2e-3, written


@pytest.mark.slow
def test_the_next_step_does_move_what_is_compared(checkpoints: dict[Layout, Saved]) -> None:
    """Negative control of the bounds above: codes of a step earlier are further away than they allow."""
    for saved in checkpoints.values():
        reader = CheckpointReader(saved.path)
        before = {name: reader.read(name) for name in reader.tensors if name.startswith("codes/")}
        assert fraction_of_codes_that_differ(before, saved.next_state, saved.config) > 1e-2
