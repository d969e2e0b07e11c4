"""A damaged checkpoint is passed over, refused by name, and never deleted; one that lies does no harm."""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from dqt_dist.checkpoint import store
from dqt_dist.checkpoint.digest import digest_of
from dqt_dist.checkpoint.folder import MANIFEST, METADATA
from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.checkpoint.store import shares
from dqt_dist.errors import UserError
from dqt_dist.training.run_folder import set_aside_other_course
from tests.checkpoint.damage import ACCIDENTS, Payload, plant, rewrite_manifest
from tests.checkpoint.states import MATRIX
from tests.distributed import run_distributed
from tests.small import small_config


@pytest.fixture
def newest(written: Path, tmp_path: Path) -> Path:
    """The newest checkpoint of a copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "run")) / "checkpoints" / "step_00000010"


# ---- accidents ----


def resume(rank: int, world_size: int, folders: dict[str, str], own: str) -> dict[str, tuple[str, list[str], str]]:
    """For each run: the checkpoint of `own`, its folder or `auto`, what is said of the others, and what an explicit
    path to step 10 says. On the way another run takes the same checkpoint, and changes nothing."""
    outcome = {}
    for name, folder in folders.items():
        config, others = small_config(f"checkpoint.dir={folder}"), small_config(f"checkpoint.dir={folder}_other")
        try:
            store.find(config, f"{folder}/checkpoints/step_00000010")
        except UserError as error:
            explicit = str(error)
        else:
            explicit = "is used"
        elsewhere = store.find(others, folder if own == "auto" else own.format(folder))
        assert elsewhere is not None
        passed_over = store.set_aside(others, elsewhere)
        checkpoint = store.find(config, own.format(folder))
        assert checkpoint is not None
        outcome[name] = checkpoint.path.name, store.set_aside(config, checkpoint), explicit
        assert elsewhere.path.name == checkpoint.path.name
        assert passed_over == [
            line.replace("set aside as left_step_00000010", "passed over") for line in outcome[name][1]
        ]
    return outcome


@pytest.mark.parametrize("own", ["auto", "{0}/checkpoints/.."])
def test_a_damaged_newest_checkpoint_is_reported_set_aside_and_the_one_before_it_used(
    written: Path, tmp_path: Path, own: str
) -> None:
    folders = {"control": str(shutil.copytree(written, tmp_path / "control"))}
    for name, (damage, _) in ACCIDENTS.items():
        folders[name] = str(shutil.copytree(written, tmp_path / name))
        damage(tmp_path / name / "checkpoints" / "step_00000010")
    of_ranks = run_distributed(resume, 3, folders, own)
    assert of_ranks[0] == of_ranks[1] == of_ranks[2]
    assert of_ranks[0].pop("control") == ("step_00000010", [], "is used")
    for name, (found, lines, explicit) in of_ranks[0].items():
        why = ACCIDENTS[name][1]
        assert found == "step_00000005", name
        (line,) = lines
        assert f"{name}/checkpoints/" in line and "step_00000010" in line and why in line
        assert line.endswith("; set aside as left_step_00000010")
        left = sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())
        assert left == ["left_step_00000010", "step_00000005"]
        if name != "a copy of an older one":  # under a name of the user's own a copy is a checkpoint
            assert "step_00000010" in explicit


def find_linked(rank: int, world_size: int, folder: str) -> tuple[bool, list[str], bool]:
    config = small_config(f"checkpoint.dir={folder}")
    checkpoint = store.find(config, "auto")
    assert checkpoint is not None
    return (
        store.is_own(config, checkpoint),
        store.set_aside(config, checkpoint),
        set_aside_other_course(config, checkpoint) is None,
    )


def test_a_newest_checkpoint_that_is_a_link_is_the_runs_own(newest: Path, tmp_path: Path) -> None:
    """Somebody moved it to another disk. A course of elsewhere would set this one aside."""
    newest.rename(tmp_path / "moved")
    newest.symlink_to(tmp_path / "moved")
    assert run_distributed(find_linked, 1, str(newest.parent.parent)) == [(True, [], True)]


def find_auto(rank: int, world_size: int, folder: str) -> str:
    with pytest.raises(UserError) as caught:
        store.find(small_config(f"checkpoint.dir={folder}"), "auto")
    return str(caught.value)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(newest: Path) -> None:
    for path in newest.parent.iterdir():
        (path / METADATA).unlink()
    (message,) = run_distributed(find_auto, 1, str(newest.parent.parent))
    assert "step_00000005" in message and "step_00000010" in message and "--resume none begins anew" in message
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step_00000005", "step_00000010"]


@pytest.mark.parametrize("number", [1, 2, 3, 9])
def test_each_file_is_in_one_share_and_shares_are_about_equal(number: int) -> None:
    files = {f"{size}": {"bytes": size} for size in (70, 30, 20, 20, 20, 10, 0)}
    parts = shares(files, number)
    assert sorted(name for part in parts for name in part) == sorted(files) and len(parts) == number
    sizes = [sum(entry["bytes"] for entry in part.values()) for part in parts]
    assert max(sizes) <= max(70, 170 / number + 10)


# ---- intent ----


def use(path: Path) -> None:
    """Everything that a tool does with a checkpoint."""
    reader = CheckpointReader(path)
    for name in reader.tensors:
        reader.read(name)
    digest_of(reader)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        use(path)
    return str(caught.value)


def test_a_planted_payload_is_named_and_not_executed(newest: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    plant(newest, marker)
    message = refused(newest)
    assert str(newest / METADATA) in message and "names 'posix' 'mkdir'" in message and not marker.exists()
    pickle.loads((newest / METADATA).read_bytes())  # the control
    assert marker.exists()


def test_a_pickle_cannot_change_a_class(newest: Path) -> None:
    """BUILD sets fields; of a class they would stay after the file is refused."""
    forged = b"cdqt\n".replace(b"dqt", b"torch.distributed.checkpoint.metadata") + b"Metadata\n}Vversion\nVx\ns\x86b."
    stolen = pickle.PROTO + b"\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x01\x00\x00\x00zK\x01s\x86b."
    for data in (forged, stolen):
        (newest / METADATA).write_bytes(data)
        rewrite_manifest(newest)
        refused(newest)
    assert "sets fields of" in refused(newest)
    assert not hasattr(Metadata, "z")
    pickle.loads(stolen)  # the control
    assert Metadata.__dict__["z"] == 1
    del Metadata.z  # type: ignore[attr-defined]


def test_a_pickle_beside_the_elements_is_not_read(newest: Path, tmp_path: Path) -> None:
    """In the data files: a payload in place of each data.pkl, in the same number of bytes."""
    marker = tmp_path / "executed"
    for file in newest.glob("*.distcp"):
        data = file.read_bytes()
        at = data.index(b"torch._utils")
        code = pickle.dumps(Payload(marker), protocol=2)
        begin = data.rindex(b"\x80\x02", 0, at)
        file.write_bytes(data[:begin] + code + data[begin + len(code) :])
    rewrite_manifest(newest)
    use(newest)
    assert not marker.exists()


CODES = f"codes/{MATRIX}"
Edit = Callable[[Metadata], Any]


def place(metadata: Any) -> Any:
    return metadata.storage_data[MetadataIndex(CODES, (0, 0))]


def latents(metadata: Any) -> Any:
    return metadata.storage_data[MetadataIndex(f"latent/{MATRIX}", (0, 0))]


def tensor(metadata: Any) -> Any:
    return metadata.state_dict_metadata[CODES]


def rename(metadata: Any, name: str) -> None:
    metadata.state_dict_metadata[name] = metadata.state_dict_metadata.pop(CODES)
    for index in [index for index in metadata.storage_data if index.fqn == CODES]:
        metadata.storage_data[MetadataIndex(name, index.offset)] = metadata.storage_data.pop(index)


def enlarge(metadata: Any) -> None:
    """A shape of 2^60 elements in one rectangle."""
    tensor(metadata).size = torch.Size((1 << 30, 1 << 30))
    tensor(metadata).chunks = [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((1 << 30, 1 << 30)))]


def share_bytes(metadata: Any) -> None:
    """A thousand tensors of the same bytes, which would take a thousand times the memory."""
    for number in range(1000):
        name = f"low_bit.x/{number}"
        metadata.state_dict_metadata[name] = tensor(metadata)
        for index in [index for index in metadata.storage_data if index.fqn == CODES]:
            metadata.storage_data[MetadataIndex(name, index.offset)] = metadata.storage_data[index]


LIES: dict[str, tuple[Edit, str]] = {
    "a path above": (
        lambda m: setattr(place(m), "relative_path", "../../secret"),
        "'../../secret', which the manifest",
    ),
    "an absolute path": (
        lambda m: setattr(place(m), "relative_path", "/etc/passwd"),
        "'/etc/passwd', which the manifest",
    ),
    "the manifest": (lambda m: setattr(place(m), "relative_path", MANIFEST), "which the manifest does not have"),
    "before the file": (lambda m: setattr(place(m), "offset", -1), "is at bytes -1"),
    "behind the file": (lambda m: setattr(place(m), "length", 1 << 40), "of a file of"),
    "another rectangle": (lambda m: m.storage_data.update({MetadataIndex(CODES, (0, 0)): latents(m)}), ", its shape "),
    "an extension": (lambda m: setattr(place(m), "transform_descriptors", ["x"]), "is not stored plainly"),
    "a huge shape": (enlarge, "bytes, stored are"),
    "bytes used often": (share_bytes, "bytes, the files have"),
    "a rectangle too few": (lambda m: tensor(m).chunks.pop(), "do not make up its shape"),
    "one rectangle twice": (lambda m: tensor(m).chunks.append(tensor(m).chunks[0]), "do not make up its shape"),
    "overlap": (
        lambda m: setattr(tensor(m), "chunks", [tensor(m).chunks[0], tensor(m).chunks[0]]),
        "do not make up its shape",
    ),
    "three axes": (lambda m: setattr(tensor(m), "size", torch.Size((1, 1, 1))), "two axes"),
    "a negative size": (lambda m: setattr(tensor(m), "size", torch.Size((-1, 8))), "two axes"),
    "another dtype": (lambda m: setattr(tensor(m).properties, "dtype", torch.int16), "which no run has"),
    "no dtype": (lambda m: setattr(tensor(m).properties, "dtype", 3), "has no dtype"),
    "a name with a terminal's codes": (lambda m: rename(m, "codes/\x1b[2J"), r"'codes/\x1b[2J' is not the name"),
    "a name of no part": (lambda m: rename(m, "low_bitten"), "which no run has"),
    "not even metadata": (lambda m: m.__dict__.clear(), "cannot be read"),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lie_are_refused(newest: Path, lie: str) -> None:
    edit, why = LIES[lie]
    metadata = pickle.loads((newest / METADATA).read_bytes())
    edit(metadata)
    (newest / METADATA).write_bytes(pickle.dumps(metadata))
    rewrite_manifest(newest)
    message = refused(newest)
    assert why in message and str(newest) in message


def test_a_compressed_rectangle_is_refused(newest: Path) -> None:
    """A few bytes could become very many."""
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 20))
    metadata = pickle.loads((newest / METADATA).read_bytes())
    stored = bomb.getvalue() + bytes(4096)
    place(metadata).offset, place(metadata).length = 0, len(bomb.getvalue())
    (newest / "__0_0.distcp").write_bytes(stored + (newest / "__0_0.distcp").read_bytes()[len(stored) :])
    (newest / METADATA).write_bytes(pickle.dumps(metadata))
    rewrite_manifest(newest)
    assert "its bytes are compressed" in refused(newest)


# ---- any bytes ----

CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=6), st.integers(0, 6)), max_size=3)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def changed(data: bytes, changes: list[tuple[float, bytes, int]]) -> bytes:
    """`data` with pieces replaced: (where as a share of the length, new bytes, number of old ones)."""
    for share, new, old in changes:
        at = int(share * len(data))
        data = data[:at] + new + data[at + old :]
    return data


@FUZZ
@given(changes=CHANGES, name=st.sampled_from([MANIFEST, METADATA]), end=st.floats(0.5, 1))
def test_whatever_the_bytes_it_is_read_or_refused(
    written: Path, tmp_path_factory: pytest.TempPathFactory, changes: list, name: str, end: float
) -> None:
    """The other digests are made right again, so that all of the checks see the bytes."""
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(written / "checkpoints" / "step_00000010", path)
    data = changed((path / name).read_bytes(), changes)
    (path / name).write_bytes(data[: int(len(data) * min(1.0, 2 * end))])
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # what is no manifest stays as it is
        rewrite_manifest(path)
    try:
        use(path)
    except UserError as error:
        assert str(error)
