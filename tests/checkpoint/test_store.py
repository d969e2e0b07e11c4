"""Checkpoints of runs: everything comes back, in every method and precision; a save that dies spoils nothing.

All pairs of layouts are in test_layouts.py, the writer alone in test_writer.py.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from dqt_dist.checkpoint import store, writer
from dqt_dist.checkpoint.folder import MANIFEST, Progress, complete_checkpoints, read_manifest
from dqt_dist.config import Config
from dqt_dist.errors import RunError, UserError
from tests import forked
from tests.checkpoint.states import write
from tests.distributed import run_distributed
from tests.parallel.runs import Run, Whole, assert_equal, fraction_of_codes_that_differ, start, whole_state
from tests.small import small_config

ROOT = Path(__file__).resolve().parents[2]
ZERO_1, ZERO_2, ZERO_3 = (f"deepspeed.zero_optimization.stage={stage}" for stage in (1, 2, 3))
BF16 = "quantization.compute=bf16"
TP, PP = "parallel.tensor=2", "parallel.pipeline=2"
SAVED_STEP = 2
Layout = tuple[Any, ...]
"""World size and overrides."""


def copied(run: Run) -> Whole:
    return {name: tensor.clone() for name, tensor in whole_state(run).items()}


def progress_at(step: int) -> Progress:
    return Progress(step, tokens=100 * step, samples=12 * step)


def save(run: Run, step: int) -> Path:
    """Writes a checkpoint of `step` and returns its folder."""
    opened = store.open_writer(run.config)
    store.save(opened, run.model_chunks, run.optimizer, run.config, progress_at(step), {"layout": "of a test"})
    opened.close()
    (figures,) = opened.take_finished()
    return figures.path


# ---- what comes back ----


@dataclass
class Saved:
    """A checkpoint after two steps, and what the run that wrote it did next."""

    folder: Path
    config: Config
    state: Whole
    next_state: Whole
    next_loss: float


def train_and_save(rank: int, world_size: int, folder: str, *overrides: str) -> Saved | None:
    run = start(*overrides, f"checkpoint.dir={folder}")
    for step in range(1, SAVED_STEP + 1):
        run.step(step)
    state = copied(run)
    path = save(run, SAVED_STEP)
    next_loss = run.mean_loss(run.step(SAVED_STEP + 1))
    saved = Saved(path, run.config, state, whole_state(run), next_loss)
    return saved if rank == 0 else None


def load_and_train(rank: int, world_size: int, path: str, *overrides: str) -> tuple[Whole, Whole, float, Progress]:
    """State as loaded, state and loss after the next step.

    One step on other data comes first, so that nothing is as saved.
    """
    run = start(*overrides)
    run.step(77)
    progress = store.load(store.opened(Path(path)), run.model_chunks, run.optimizer, run.config)
    state = copied(run)
    next_loss = run.mean_loss(run.step(progress.step + 1))
    return state, whole_state(run), next_loss, progress


@pytest.fixture(scope="module")
def saved_at(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(layout: Layout) -> Saved:
        world_size, *overrides = layout
        saved = run_distributed(train_and_save, world_size, str(tmp_path_factory.mktemp("run")), *overrides)[0]
        assert saved is not None
        return saved

    return make


SCHEDULE = ("optimizer.schedule=linear", "optimizer.warmup_steps=2")  # the rate says which step is the next
INTERLEAVED = (PP, "parallel.virtual_pipeline=2")
FOUR_LAYERS = ("model.num_layers=4", "training.global_batch_size=8")
BITNET, NONE = "quantization.method=bitnet", "quantization.method=none"
ADAFACTOR, MOMENT = "optimizer.name=adafactor", "optimizer.low_bit_beta1=0.9"
STATE_8 = ("optimizer.state_bits=8", "model.hidden_size=64", "model.ffn_hidden_size=64")
LATENTS = ("quantization.latent_bits=8", "quantization.scale_refit_interval=3")
EXTRAS = ("quantization.embeddings=true", "model.sub_norm=true")
SAME_LAYOUT: list[Layout] = [
    (1, *SCHEDULE),
    (3, ZERO_1, "quantization.bits=8"),
    (4, TP, ZERO_1, BF16),
    (2, *INTERLEAVED, *FOUR_LAYERS),
    (4, TP, ZERO_1, ADAFACTOR, MOMENT),
    (2, TP, BITNET),
    (2, ZERO_1, *STATE_8),
    (4, TP, ZERO_1, ADAFACTOR, *LATENTS),
]


@pytest.mark.parametrize("layout", SAME_LAYOUT, ids=str)
def test_a_run_goes_on_bit_for_bit(saved_at: Any, layout: Layout) -> None:
    saved = saved_at(layout)
    world_size, *overrides = layout
    state, next_state, next_loss, progress = run_distributed(load_and_train, world_size, str(saved.folder), *overrides)[
        0
    ]
    assert progress == progress_at(SAVED_STEP)
    assert_equal(state, saved.state)
    assert next_loss == saved.next_loss
    assert_equal(next_state, saved.next_state)
    moved = [name for name in state if not torch.equal(next_state[name], state[name])]
    assert len(moved) >= len([name for name in state if not name.startswith("scale/")]) - 1


OTHER_LAYOUT: list[tuple[Layout, Layout, tuple[str, ...]]] = [
    ((4, TP, PP), (3, ZERO_1), ("quantization.bits=4",)),
    ((4, TP, ZERO_1), (1,), ("quantization.bits=6",)),
    ((1,), (4, TP, ZERO_3), ("quantization.bits=6",)),
    ((2, *INTERLEAVED), (2, TP), FOUR_LAYERS),
    ((4, TP, ZERO_1), (1,), (BF16,)),
    ((1,), (4, TP, ZERO_1), (BF16,)),
    ((4, TP, ZERO_3), (1,), (BF16,)),
    ((3, ZERO_2), (2, ZERO_3), ()),
    ((3, ZERO_1), (2, ZERO_1), (BF16, NONE)),
    ((2, TP), (3, ZERO_1), (BITNET,)),
    ((4, TP, ZERO_1), (1,), (ADAFACTOR, MOMENT)),
    ((1,), (4, TP, ZERO_1), (ADAFACTOR, MOMENT)),
    ((2, TP), (2, ZERO_1), EXTRAS),
    ((4, TP, ZERO_3), (3, ZERO_1), (*STATE_8, *LATENTS)),
]


@pytest.mark.parametrize(("written", "read", "overrides"), OTHER_LAYOUT, ids=str)
def test_another_layout_loads_the_same_bits_and_goes_on(
    saved_at: Any, written: Layout, read: Layout, overrides: tuple[str, ...]
) -> None:
    saved = saved_at((*written, *overrides))
    world_size, *parallel = read
    state, next_state, next_loss, _ = run_distributed(
        load_and_train, world_size, str(saved.folder), *overrides, *parallel
    )[0]
    assert_equal(state, saved.state)
    # The next step adds up in another order (test_step.py): bf16 keeps 8 bits of every product, fp32 24.
    assert next_loss == pytest.approx(saved.next_loss, rel=1e-3 if BF16 in overrides else 1e-6)
    if any(name.startswith("codes/") for name in state):
        bound = 4e-2 if BF16 in overrides else 2e-3
        assert fraction_of_codes_that_differ(next_state, saved.next_state, saved.config) <= bound


def test_a_wrong_rank_of_moments_would_be_seen(saved_at: Any) -> None:
    """Negative control: the moments that are compared are not zeros, and no two matrices have the same."""
    state = saved_at((1, *SCHEDULE)).state
    moments = [tensor for name, tensor in state.items() if ".exp_avg/" in name and tensor.shape == (32, 32)]
    assert len(moments) > 2 and all(tensor.abs().max() > 0 for tensor in moments)
    assert all(not torch.equal(a, b) for i, a in enumerate(moments) for b in moments[:i])


# ---- what is stored ----


@pytest.mark.parametrize(("bits", "stored_bits"), [("ternary", 2), (4, 4), (6, 6), (8, 8)])
def test_codes_are_stored_at_their_width(saved_at: Any, bits: str | int, stored_bits: int) -> None:
    saved = saved_at((1, f"quantization.bits={bits}"))
    metadata = FileSystemReader(saved.folder).read_metadata().state_dict_metadata
    sizes = {name: (m.size.numel(), m.properties.dtype.itemsize) for name, m in metadata.items() if "codes/" in name}
    assert len(sizes) == 2 * 7
    assert 8 * sum(numel * itemsize for numel, itemsize in sizes.values()) == stored_bits * 2 * 7680


def test_the_files_shrink_with_the_codes(saved_at: Any) -> None:
    """Counted on the disk. All else is equal, and every block of codes fills torch's 64-byte padding exactly."""

    def tensor_bytes(bits: str | int) -> int:
        folder = saved_at((1, f"quantization.bits={bits}")).folder
        return sum(path.stat().st_size for path in folder.glob("*.distcp"))

    assert tensor_bytes(8) - tensor_bytes(6) == 2 * 7680 * 2 / 8
    assert tensor_bytes(6) - tensor_bytes(4) == 2 * 7680 * 2 / 8
    assert tensor_bytes(4) - tensor_bytes("ternary") == 2 * 7680 * 2 / 8


def test_the_manifest_says_what_it_is(saved_at: Any) -> None:
    saved = saved_at((1, *SCHEDULE))
    manifest = read_manifest(saved.folder)
    assert (manifest["format"], manifest["layout"]) == (2, "of a test")
    assert (manifest["step"], manifest["tokens"], manifest["samples"]) == (2, 200, 24)
    assert manifest["config"] == saved.config.model_dump(mode="json")
    on_disk = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in saved.folder.iterdir()
        if path.name != MANIFEST
    }
    assert manifest["files"] == on_disk and len(on_disk) == 2


# ---- saves that die ----

DYING_SAVE = """
import os, signal, sys
from pathlib import Path
import torch.distributed as dist
import dqt_dist
from dqt_dist.checkpoint.writer import CheckpointWriter
from tests.checkpoint.test_store import save
from tests.parallel.runs import start

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    moment, folder = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    run = start(f"checkpoint.dir={folder}", "checkpoint.keep_last=1")
    save(run, 1)
    run.step(1)
    if moment == "in a tensor file":
        os.fsync = die                      # the first file is written, not yet safe
    elif moment == "before the rename":     # everything is written, under the partial name
        Path.rename = die
    elif moment == "before old ones go":
        CheckpointWriter._drop = die
    save(run, 2)
"""
MOMENTS = {"in a tensor file": 1, "before the rename": 1, "before old ones go": 2}
"""Moment of the kill and the checkpoint that must be found after it."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_save_leaves_the_last_good_checkpoint_and_the_next_save_works(moment: str, tmp_path: Path) -> None:
    """kill -9 at each moment of a save. Afterwards auto finds the newest complete checkpoint, which loads."""
    script = tmp_path / "script.py"
    script.write_text(DYING_SAVE)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "LOCAL_RANK": "0",
    }
    done = forked.run([script, moment, tmp_path], environment)
    assert done.returncode == -signal.SIGKILL, done.stderr

    assert run_distributed(load_and_save_next, 1, str(tmp_path)) == [MOMENTS[moment]]
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left[-2:] == [f"step_{MOMENTS[moment]:08d}", "step_00000005"] and not left[0].startswith(".")


def load_and_save_next(rank: int, world_size: int, folder: str) -> int:
    run = start(f"checkpoint.dir={folder}")
    found = store.find(run.config, "auto")
    assert found is not None
    step = store.load(found, run.model_chunks, run.optimizer, run.config).step
    save(run, 5)
    return step


def save_that_fails_on_one_rank(rank: int, world_size: int, folder: str) -> list[str]:
    run = start(f"checkpoint.dir={folder}", ZERO_1)
    save(run, 1)
    usual = writer.FileSystemWriter

    class FullDisk(usual):
        def write_data(self, plan: Any, planner: Any) -> Any:
            if rank == 1:
                raise OSError(28, "No space left on device")
            return super().write_data(plan, planner)

    writer.FileSystemWriter = FullDisk  # type: ignore[misc]
    try:
        with pytest.raises(RunError, match=r"could not be written by rank 1: .*No space left on device"):
            save(run, 2)
    finally:
        writer.FileSystemWriter = usual  # type: ignore[misc]
    kept = [path.name for path in complete_checkpoints(store.checkpoints_folder(run.config))]
    save(run, 3)
    return kept


def test_a_full_disk_on_one_rank_stops_all_and_spoils_nothing(tmp_path: Path) -> None:
    assert run_distributed(save_that_fails_on_one_rank, 2, str(tmp_path)) == [["step_00000001"]] * 2
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_00000001", "step_00000003"]


# ---- wrong checkpoints ----


@pytest.fixture
def damaged(saved_at: Any, tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(saved_at((1, *SCHEDULE)).folder, tmp_path / "step_00000002"))


def load_message(rank: int, world_size: int, path: str, *overrides: str) -> tuple[str, bool]:
    """The UserError of a load, and whether the state is as before it."""
    run = start(*overrides)
    before = copied(run)
    with pytest.raises(UserError) as caught:
        store.load(store.opened(Path(path)), run.model_chunks, run.optimizer, run.config)
    after = whole_state(run)
    return str(caught.value), all(torch.equal(after[name], before[name]) for name in before)


def test_a_missing_file_is_named(damaged: Path) -> None:
    (file,) = damaged.glob("*.distcp")
    size = file.stat().st_size
    file.unlink()
    message, untouched = run_distributed(load_message, 1, str(damaged))[0]
    assert f"{file.name} is missing" in message and str(damaged) in message and f"{size} bytes" in message and untouched


def test_a_truncated_file_is_named_with_both_sizes(damaged: Path) -> None:
    (file,) = damaged.glob("*.distcp")
    size = file.stat().st_size
    with open(file, "r+b") as handle:
        handle.truncate(size - 1)
    message, untouched = run_distributed(load_message, 1, str(damaged))[0]
    assert file.name in message and f"{size - 1} bytes" in message and f"{size} bytes" in message and untouched


OTHER_MODELS = {
    "model.num_layers=4": ("model.num_layers", "2", "4"),
    "model.ffn_hidden_size=64": ("model.ffn_hidden_size", "48", "64"),
    "model.sub_norm=true": ("model.sub_norm", "False", "True"),
    "model.rope_base=500000.0": ("model.rope_base", "10000.0", "500000.0"),
    "quantization.bits=4": ("quantization.bits", "'ternary'", "4"),
    "quantization.method=none": ("quantization.method", "'dqt'", "'none'"),
    "quantization.embeddings=true": ("quantization.embeddings", "False", "True"),
    "optimizer.name=adafactor": ("optimizer.name", "'adamw'", "'adafactor'"),
    "optimizer.second_moment=factored": ("optimizer.second_moment", "'full'", "'factored'"),
}


@pytest.mark.parametrize("override", OTHER_MODELS)
def test_another_model_is_refused_by_field_with_both_values(saved_at: Any, override: str) -> None:
    manifest = read_manifest(saved_at((1, *SCHEDULE)).folder)
    field, saved, current = OTHER_MODELS[override]
    with pytest.raises(UserError) as caught:
        store.check_identity(manifest, small_config(override), Path("of a test"))
    assert f"{field}: the checkpoint has {saved}, the config {current}" in str(caught.value)
    # Adafactor differs in the form of its second moment too.
    assert len(str(caught.value).splitlines()) == (3 if field == "optimizer.name" else 2)


def test_what_may_change_between_runs_is_not_refused(saved_at: Any) -> None:
    """Negative control of the above."""
    manifest = read_manifest(saved_at((1, *SCHEDULE)).folder)
    others = ["training.steps=99", "optimizer.learning_rate=1e-4", TP, ZERO_1, BF16, "training.seed=5"]
    store.check_identity(manifest, small_config(*others), Path("of a test"))


def test_moments_of_other_bits_are_refused_and_old_ones_have_32(saved_at: Any) -> None:
    manifest = read_manifest(saved_at((1, *SCHEDULE)).folder)
    for field in ("state_bits", "second_moment"):  # as it was before there was a choice
        del manifest["config"]["optimizer"][field]
    store.check_identity(manifest, small_config(), Path("of a test"))
    with pytest.raises(UserError, match=r"optimizer\.state_bits: the checkpoint has 32, the config 8"):
        store.check_identity(manifest, small_config(*STATE_8), Path("of a test"))


@pytest.mark.parametrize("first_moment_saved", [True, False])
def test_a_tensor_too_few_or_too_many_is_named(saved_at: Any, first_moment_saved: bool) -> None:
    """Adafactor with and without a first moment is the same model with other state."""
    saved = saved_at((1, ADAFACTOR, MOMENT) if first_moment_saved else (1, ADAFACTOR))
    overrides = (ADAFACTOR,) if first_moment_saved else (ADAFACTOR, MOMENT)
    message, untouched = run_distributed(load_message, 1, str(saved.folder), *overrides)[0]
    where = "in the checkpoint, not in this run" if first_moment_saved else "in this run, not in the checkpoint"
    assert "14 tensors do not match" in message and untouched
    assert f"low_bit.exp_avg/layers.0.mlp.down_proj: {where}" in message


# ---- --resume ----


def what_resume_finds(rank: int, world_size: int, folder: str, resumes: list[str]) -> list[str]:
    """Name of the checkpoint, or the message, of each `--resume` for the run in `folder`."""
    config, found = small_config(f"checkpoint.dir={folder}"), []
    for resume in resumes:
        try:
            checkpoint = store.find(config, resume)
        except UserError as error:
            found.append(str(error))
        else:
            found.append("none" if checkpoint is None else checkpoint.path.name)
    return found


def test_resume_finds_what_it_is_told(tmp_path: Path) -> None:
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    assert run_distributed(what_resume_finds, 1, str(run), ["auto"]) == [["none"]]
    run_distributed(write, 1, str(run), [9, 10])
    (checkpoints / ".partial_step_00000012").mkdir()
    asked = ["auto", "none", str(checkpoints / "step_00000009"), str(run), str(checkpoints), str(tmp_path)]
    of_ranks = run_distributed(what_resume_finds, 2, str(run), asked)
    assert of_ranks[0] == of_ranks[1]
    *found, message = of_ranks[0]
    assert found == ["step_00000010", "none", "step_00000009", "step_00000010", "step_00000010"]
    assert "no complete checkpoint there" in message
    assert store.start_of(None) == Progress(0, 0, 0)
