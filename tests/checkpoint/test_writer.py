"""The writer: what is saved is the state of that moment, failures are heard, the right checkpoints stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dqt_dist.checkpoint import writer as writer_module
from dqt_dist.checkpoint.folder import complete_checkpoints, verify
from dqt_dist.checkpoint.logical_tensor import LogicalTensor
from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.checkpoint.writer import HostStage, Retention
from dqt_dist.errors import RunError, UserError
from tests.checkpoint.states import facts, open_writer, own_rows, progress_at, whole_tensors, write
from tests.distributed import run_distributed

ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_holds(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    reader = CheckpointReader(path)
    assert reader.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor), name
        info = reader.tensors[name]
        assert (info.shape, info.dtype, info.num_bytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert info.disk_bytes >= tensor.nbytes


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_rectangles_of_all_ranks_are_read_back_as_whole_tensors(tmp_path: Path, ranks: int) -> None:
    run_distributed(write, ranks, str(tmp_path), [7])
    path = tmp_path / "checkpoints" / "step_00000007"
    assert_holds(path, whole_tensors())
    assert CheckpointReader(tmp_path).progress == progress_at(7)
    assert len(list(path.glob("*.distcp"))) == ranks and verify(path) > 0


# ---- asynchronous ----


class Gate:
    """A gate that holds back every write of tensors until it is opened, as if training went on meanwhile."""

    def __init__(self) -> None:
        self.opened, self.usual = threading.Event(), writer_module.dcp_save

    def __enter__(self) -> Gate:
        def save_when_opened(*args: Any, **named: Any) -> Any:
            assert self.opened.wait(60)
            return self.usual(*args, **named)

        writer_module.dcp_save = save_when_opened
        return self

    def __exit__(self, *_: Any) -> None:
        self.opened.set()
        writer_module.dcp_save = self.usual


def train_while_writing(rank: int, world_size: int, folder: str) -> list[Any]:
    state = own_rows(whole_tensors(seed=1))
    writer = open_writer(Path(folder), asynchronous=True)
    with Gate() as gate:
        writer.save(state, progress_at(1), facts(Path(folder)))
        for tensor in state.values():  # training goes on
            for chunk in tensor.chunks.values():
                chunk.zero_()
        nothing_yet = writer.take_finished(), complete_checkpoints(Path(folder) / "checkpoints")
        gate.opened.set()
        writer.save(own_rows(whole_tensors(seed=2)), progress_at(2), facts(Path(folder)))  # waits for the first
    writer.close()
    return [nothing_yet, writer.take_finished()]


def test_an_asynchronous_save_holds_the_state_of_its_moment(tmp_path: Path) -> None:
    """The state is zeroed while the write is held back; the second save uses the staging memory again."""
    for nothing_yet, finished in run_distributed(train_while_writing, 2, str(tmp_path)):
        assert nothing_yet == ([], [])
        assert [figures.step for figures in finished] == [1, 2]
        for figures in finished:
            assert 0 < figures.save_blocked_seconds <= figures.save_seconds
            assert figures.save_bytes == verify(figures.path)
    for step in (1, 2):
        assert_holds(tmp_path / "checkpoints" / f"step_0000000{step}", whole_tensors(seed=step))


def save_synchronously(rank: int, world_size: int, folder: str) -> Any:
    writer = open_writer(Path(folder))
    writer.save(own_rows(whole_tensors()), progress_at(1), facts(Path(folder)))
    return writer.take_finished()


def test_a_synchronous_save_blocks_for_all_of_its_time(tmp_path: Path) -> None:
    ((figures,),) = run_distributed(save_synchronously, 1, str(tmp_path))
    assert figures.save_blocked_seconds == figures.save_seconds > 0


def fail_in_the_thread(rank: int, world_size: int, folder: str, next_call: str) -> list[str]:
    """A disk that is full on rank 1 for the second save: what the call after it raises, and what is left."""
    writer = open_writer(Path(folder), asynchronous=True)
    state, of_test = own_rows(whole_tensors()), facts(Path(folder))
    writer.save(state, progress_at(1), of_test)
    writer.wait()
    usual = writer_module.sha256_of

    def full_disk(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    if rank == 1:
        writer_module.sha256_of = full_disk
    try:
        writer.save(state, progress_at(2), of_test)
        with pytest.raises(RunError, match=r"could not be written by rank 1: .*No space left on device"):
            writer.save(state, progress_at(3), of_test) if next_call == "save" else getattr(writer, next_call)()
    finally:
        writer_module.sha256_of = usual
    kept = [path.name for path in complete_checkpoints(Path(folder) / "checkpoints")]
    if next_call != "close":
        writer.save(state, progress_at(4), of_test)
    writer.close()
    assert [figures.step for figures in writer.take_finished()] == ([1] if next_call == "close" else [1, 4])
    return kept


@pytest.mark.parametrize("next_call", ["save", "wait", "close"])
def test_a_failure_in_the_thread_is_raised_on_all_ranks_by_the_next_call(tmp_path: Path, next_call: str) -> None:
    """The checkpoint before the failed save stays; the next save works and clears the remains."""
    assert run_distributed(fail_in_the_thread, 2, str(tmp_path), next_call) == [["step_00000001"]] * 2
    if next_call != "close":
        assert names(tmp_path) == ["step_00000001", "step_00000004"]


KILLED = """
import os, signal, sys, threading
from pathlib import Path
import torch.distributed as dist
from dqt_dist.checkpoint import writer as writer_module
from tests.checkpoint.states import facts, open_writer, own_rows, progress_at, whole_tensors

folder = Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
writer = open_writer(folder, asynchronous=True, keep_last=1)
state, of_test = own_rows(whole_tensors()), facts(folder)
writer.save(state, progress_at(1), of_test)
writer.wait()
written = threading.Event()

def hang(*_):
    written.set()
    threading.Event().wait()

writer_module.sha256_of = hang          # the tensors are written, the manifest is not
writer.save(state, progress_at(2), of_test)
written.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_during_an_asynchronous_write_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names(tmp_path) == [".partial_step_00000002", "step_00000001"]
    assert list((tmp_path / "checkpoints" / ".partial_step_00000002").glob("*.distcp"))
    assert_holds(CheckpointReader(tmp_path).path, whole_tensors())


# ---- what stays ----


@pytest.mark.parametrize(
    ("retention", "steps", "left"),
    [
        (Retention(1), [1, 2, 3, 10], [10]),
        (Retention(2), [1, 2, 3, 10], [3, 10]),
        (Retention(9), [1, 2], [1, 2]),
        (Retention(1, keep_every=4), [2, 4, 6, 8, 10, 12, 14], [4, 8, 12, 14]),
        (Retention(2, keep_every=4), [2, 4, 6, 8, 10], [4, 8, 10]),
        (Retention(3, keep_every=100), [2, 4, 6, 8], [4, 6, 8]),
        (Retention(1), [1, 5, 9, 3], [3, 9]),  # gone back to step 1: what came later is not this run's to delete
    ],
)
def test_the_newest_and_the_regular_ones_stay(retention: Retention, steps: list[int], left: list[int]) -> None:
    kept: list[int] = []
    for step in steps:
        kept.append(step)
        gone = retention.dropped(kept, saved=step)
        assert step not in gone
        kept = [other for other in kept if other not in gone]
    assert sorted(kept) == left


def write_with_retention(rank: int, world_size: int, folder: str, steps: list[int]) -> None:
    writer = open_writer(Path(folder), keep_last=2, keep_every=3)
    for step in steps:
        writer.save(own_rows(whole_tensors(step)), progress_at(step), facts(Path(folder)))


def test_the_folders_that_stay_are_those_and_the_same_step_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    run_distributed(write_with_retention, 1, str(tmp_path), [1, 2, 3, 4, 5])
    assert names(tmp_path) == ["step_00000003", "step_00000004", "step_00000005"]
    run_distributed(write, 1, str(tmp_path), [5], 55)
    assert names(tmp_path) == ["step_00000003", "step_00000004", "step_00000005"]
    assert_holds(tmp_path / "checkpoints" / "step_00000005", whole_tensors(55))


# ---- staging ----


def check_stage(device: str) -> None:
    """Odd sizes, an empty rectangle, views with gaps between their rows; then a larger state, then the first again."""
    base = torch.arange(7 * 11, dtype=torch.float32, device=device).view(7, 11)
    views = {"gaps": base[:, 2:5], "odd": torch.ones(3, 5, dtype=torch.int8, device=device), "empty": base[:0]}
    large = {"large": torch.arange(999, dtype=torch.uint8, device=device).view(333, 3)}
    stage = HostStage()
    for tensors in (views, large, views):
        state = {name: LogicalTensor((9, 9), view.dtype, {(2, 1): view}) for name, view in tensors.items()}
        staged = stage.copy(state)
        for name, view in tensors.items():
            (copy,) = staged[name].chunks.values()
            assert staged[name].chunks.keys() == {(2, 1)} and copy.device.type == "cpu"
            assert copy.dtype == view.dtype and torch.equal(copy, view.cpu())
            assert device == "cpu" or copy.numel() == 0 or copy.is_pinned()
    address = stage.buffer.data_ptr()
    stage.copy({"odd": LogicalTensor((3, 5), torch.int8, {(0, 0): views["odd"]})})
    assert stage.buffer.data_ptr() == address  # no new memory for a smaller state


def test_staging_copies_every_rectangle_and_uses_its_memory_again() -> None:
    check_stage("cpu")


@pytest.mark.gpu
def test_staging_from_a_gpu_goes_to_pinned_memory() -> None:
    check_stage("cuda")


def see_only_own_files(rank: int, world_size: int, folder: str) -> str:
    """What rank 0 of a cluster without a shared file system sees: its own files."""
    writer = open_writer(Path(folder) / str(rank))
    with pytest.raises(UserError) as caught:
        writer.save(own_rows(whole_tensors()), progress_at(1), facts(Path(folder)))
    return str(caught.value)


def test_a_folder_that_the_nodes_do_not_share_is_refused_on_all_ranks(tmp_path: Path) -> None:
    messages = run_distributed(see_only_own_files, 2, str(tmp_path))
    assert messages[0] == messages[1] and "rank 0 does not see __1_0.distcp" in messages[0]
    assert not complete_checkpoints(tmp_path / "0" / "checkpoints")
