"""A disk that refuses: one message with errno and file, the checkpoints before it as they were."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from dqt_dist.checkpoint.folder import complete_checkpoints, verify
from dqt_dist.checkpoint.logical_tensor import LogicalTensor
from dqt_dist.checkpoint.writer import not_finite
from dqt_dist.errors import RunError
from tests.checkpoint.states import MATRIX, facts, open_writer, own_rows, progress_at, whole_tensors, write
from tests.distributed import run_distributed

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534


@contextmanager
def fault(kind: str, folder: Path) -> Iterator[None]:
    """The disk below `folder` refuses within the block; afterwards this process may write again."""
    if kind == "a limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    elif kind == "full":
        with open(folder / "filler", "wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(512))
    else:
        (folder / "checkpoints").chmod(0o555 if kind == "read-only" else 0o777)
        os.seteuid(NOBODY if os.geteuid() == 0 else os.geteuid())  # root may write anywhere
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def save_with(rank: int, world_size: int, kind: str, folder: Path, asynchronous: bool = False) -> list[str]:
    """Saves steps 1 and, under the fault, 2: the message of the second, and a line for each that was made."""
    writer = open_writer(folder, asynchronous, keep_last=1)
    state, of_test = own_rows(whole_tensors()), facts(folder)
    writer.save(state, progress_at(1), of_test)
    writer.wait()
    lines = []
    with fault(kind, folder):
        try:
            writer.save(state, progress_at(2), of_test)
            writer.wait()
        except RunError as error:
            lines.append(str(error))
    writer.close()
    return lines + [" ".join([saved.path.name, *saved.warnings]) for saved in writer.take_finished()]


def refused(*of_call: Any) -> list[str]:
    (lines,) = run_distributed(save_with, 1, *of_call)
    return lines


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_that_cannot_grow_is_named_with_the_errno(asynchronous: bool, tmp_path: Path) -> None:
    message, finished = refused("a limit", tmp_path, asynchronous)
    file = tmp_path / "checkpoints" / ".partial_step_00000002" / "__0_0.distcp"
    assert f"could not be written by rank 0: [Errno 27] File too large: '{file}'" in message
    assert finished == "step_00000001"
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step_00000001"]
    verify(tmp_path / "checkpoints" / "step_00000001")


def may_mount() -> bool:
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(
            ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"], capture_output=True
        ).returncode
    )


FILLED = """
import sys
from pathlib import Path
import torch.distributed as dist
from tests.checkpoint.test_faults_of_the_disk import save_with

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print(*save_with(0, 1, "full", Path(sys.argv[1])), *sorted(Path(sys.argv[1]).glob("checkpoints/*")), sep="\\n")
"""


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a tmpfs")
def test_a_full_disk_is_named_with_the_errno(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=96k none {tmp_path}; exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", FILLED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    message, saved, *left = done.stdout.splitlines()
    assert "could not be written by rank 0: [Errno 28] No space left on device: '" in message
    assert ".partial_step_00000002" in message and saved == "step_00000001"
    assert f"{tmp_path}/checkpoints/step_00000001" in left and f"{tmp_path}/checkpoints/step_00000002" not in left


def test_a_read_only_folder_is_named_with_the_errno(open_folder: Path) -> None:
    message = refused("read-only", open_folder)[0]
    assert "[Errno 13] Permission denied: " in message and ".partial_step_00000002" in message
    assert [path.name for path in complete_checkpoints(open_folder / "checkpoints")] == ["step_00000001"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a checkpoint of another user")
def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(open_folder: Path) -> None:
    """The folder may be renamed, its files belong to another user."""
    lines = refused("undeletable", open_folder)
    assert "step_00000002 warning: " in lines[-1] and "cannot be deleted: [Errno 13] Permission denied" in lines[-1]
    assert [path.name for path in complete_checkpoints(open_folder / "checkpoints")] == ["step_00000002"]


def save_behind_a_link(rank: int, world_size: int, folder: str) -> list[list[str]]:
    """Warnings of three saves that keep one checkpoint, of which the oldest was moved and linked."""
    run = Path(folder)
    old = run / "checkpoints" / "step_00000001"
    old.rename(run / "moved")
    old.symlink_to(run / "moved")
    writer = open_writer(run, keep_last=1)
    for step in (2, 3, 4):
        writer.save(own_rows(whole_tensors()), progress_at(step), facts(run))
    return [figures.warnings for figures in writer.take_finished()]


def test_a_linked_checkpoint_stays_and_is_told_of_once(tmp_path: Path) -> None:
    run_distributed(write, 1, str(tmp_path), [1])
    ((first, *others),) = run_distributed(save_behind_a_link, 1, str(tmp_path))
    assert len(first) == 1 and "step_00000001 is a link; it stays" in first[0] and others == [[], []]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000004"]
    verify(tmp_path / "moved")


def test_what_is_in_the_place_of_a_checkpoint_makes_room(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints" / "step_00000003"
    place.parent.mkdir()
    for in_the_way in (lambda: place.write_text("a file"), lambda: place.symlink_to(tmp_path / "nowhere")):
        in_the_way()
        run_distributed(write, 1, str(tmp_path), [3])
        verify(place)
        shutil.rmtree(place)


# ---- values that are not finite ----


def save_not_finite(rank: int, world_size: int, folder: str, asynchronous: bool, value: float) -> str:
    writer = open_writer(Path(folder), asynchronous)
    state: dict[str, Any] = own_rows(whole_tensors())
    writer.save(state, progress_at(1), facts(Path(folder)))
    if rank == 1:
        for name in (f"low_bit.exp_avg/{MATRIX}", "parameter/norm"):
            (chunk,) = state[name].chunks.values()
            chunk[3, 0] = value
    with pytest.raises(RunError) as caught:
        writer.save(state, progress_at(2), facts(Path(folder)))
    writer.close()
    return str(caught.value)


@pytest.mark.parametrize(("asynchronous", "value"), [(False, float("nan")), (True, float("-inf"))])
def test_values_that_are_not_finite_are_never_written(tmp_path: Path, asynchronous: bool, value: float) -> None:
    messages = run_distributed(save_not_finite, 2, str(tmp_path), asynchronous, value)
    assert messages[0] == messages[1]
    assert f"step 2: low_bit.exp_avg/{MATRIX} has values that are not finite on rank 1" in messages[0]
    assert "1 more" in messages[0]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000001"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_anywhere_is_found(value: float) -> None:
    base = torch.full((7, 11), torch.finfo(torch.float32).max)
    codes = LogicalTensor((7, 11), torch.int8, {(0, 0): torch.ones(7, 11, dtype=torch.int8)})
    state = {"a": LogicalTensor((7, 11), torch.float32, {(0, 0): base[:4, 2:5], (4, 0): base[:0]}), "codes": codes}
    assert not_finite(state) == [] == not_finite({"codes": codes})  # the control: the largest float is finite
    for at in ((0, 2), (3, 4), (2, 3)):
        changed = base.clone()
        changed[at] = value
        state["a"] = LogicalTensor((7, 11), torch.float32, {(4, 0): base[:3], (0, 0): changed[:4, 2:5]})
        assert not_finite(state) == ["a"]
