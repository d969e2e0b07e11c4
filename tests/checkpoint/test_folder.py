"""What a checkpoint folder is: any path to it finds it, others are refused, its files agree with the manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dqt_dist.checkpoint.folder import MANIFEST, DamagedCheckpoint, read_manifest, resolve, verify
from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.errors import UserError
from tests.checkpoint.damage import flip, rewrite_manifest


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "run"))


@pytest.fixture
def newest(run: Path) -> Path:
    return run / "checkpoints" / "step_00000010"


# ---- finding ----


def test_a_checkpoint_a_run_and_its_checkpoints_folder_lead_to_it(run: Path, newest: Path) -> None:
    older = run / "checkpoints" / "step_00000005"
    assert resolve(older) == older
    assert resolve(run) == resolve(run / "checkpoints") == resolve(newest) == newest
    newest.rename(run / "checkpoints" / ".partial_step_00000010")
    assert resolve(run) == older


def test_what_is_not_a_checkpoint_is_said_to_be_what_it_is(run: Path, newest: Path, tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            resolve(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "no such file or folder" in message(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "a file; a checkpoint is a folder" in message(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no complete checkpoint there" in message(tmp_path / "empty")
    (newest / MANIFEST).unlink()
    assert f"half-written checkpoint, {MANIFEST} is missing" in message(newest)
    shutil.rmtree(run / "checkpoints" / "step_00000005")
    newest.rename(run / "checkpoints" / ".partial_step_00000010")
    assert "half-written: .partial_step_00000010" in message(run)


# ---- the manifest ----


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON: Expecting value at line 1, column 1; use an older checkpoint"),
        ("{", "not JSON"),
        ("[]", "holds a JSON list, expected an object"),
        ("[" * 100_000, "not JSON that can be read: nested too deeply"),
        ('{"step": 1}', "not a checkpoint manifest"),
        ('{"format": 1, "files": {}}', "checkpoint format 1, this version reads 2"),
        ('{"format": "x"}', "checkpoint format 'x', this version reads 2"),
        ('{"format": 2}', "step, tokens, samples, config, files missing or of the wrong type"),
    ],
)
def test_a_foreign_manifest_is_refused(newest: Path, text: str, why: str) -> None:
    (newest / MANIFEST).write_text(text)
    for read in (read_manifest, CheckpointReader, verify):
        with pytest.raises(UserError) as caught:
            read(newest)
        assert why in str(caught.value) and str(newest) in str(caught.value)


def test_damaged_entries_of_a_manifest_are_named(newest: Path) -> None:
    rewrite_manifest(newest, files=read_manifest(newest)["files"] | {"other": 17})
    with pytest.raises(UserError, match=r"files.other has no bytes or sha256"):
        read_manifest(newest)
    rewrite_manifest(newest, files={".metadata": {"bytes": 1, "sha256": "0" * 64}}, config={"model": {}})
    with pytest.raises(UserError, match="config is not one of this version"):
        CheckpointReader(newest)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/b", "..", ".", "", "a\\nb", MANIFEST])
def test_a_manifest_names_files_of_its_folder_only(newest: Path, name: str) -> None:
    rewrite_manifest(newest, files=read_manifest(newest)["files"] | {name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(UserError, match="is not the name of a file in the checkpoint's folder"):
        read_manifest(newest)


def test_a_flipped_bit_of_a_manifest_is_found(newest: Path) -> None:
    """A number that is another number is good JSON; so is a learning rate with another exponent."""
    text = (newest / MANIFEST).read_text()
    for old, new in {'"tokens": 1000': '"tokens": 5000', '"learning_rate": 0.01': '"learning_rate": 0.05'}.items():
        assert old in text
        (newest / MANIFEST).write_text(text.replace(old, new))
        with pytest.raises(DamagedCheckpoint, match=r"its content has sha256 [0-9a-f]{64}, it says [0-9a-f]{64}"):
            read_manifest(newest)
    (newest / MANIFEST).write_text(json.dumps(json.loads(text)))  # the control: the same content as other text
    read_manifest(newest)


# ---- the files ----

FILES = {".metadata", "__0_0.distcp", "__1_0.distcp"}


def test_whole_files_pass_and_their_bytes_are_counted(newest: Path) -> None:
    assert set(read_manifest(newest)["files"]) == FILES
    assert verify(newest) == sum((newest / name).stat().st_size for name in FILES)


@pytest.mark.parametrize("name", sorted(FILES))
def test_one_flipped_bit_in_any_file_is_found(newest: Path, name: str) -> None:
    flip(newest / name)
    for read in (verify, CheckpointReader):
        with pytest.raises(DamagedCheckpoint) as caught:
            read(newest)
        assert "1 bad file(s)" in str(caught.value) and f"{name} has another content" in str(caught.value)


def test_every_bad_file_is_named(newest: Path) -> None:
    size = (newest / "__0_0.distcp").stat().st_size
    with open(newest / "__0_0.distcp", "r+b") as file:
        file.truncate(size - 1)
    (newest / "__1_0.distcp").unlink()
    flip(newest / ".metadata")
    (newest / "notes.txt").touch()
    with pytest.raises(UserError) as caught:
        verify(newest)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5 and "4 bad file(s)" in lines[0]
    assert ".metadata has another content: sha256" in lines[1]
    assert f"__0_0.distcp has {size - 1} bytes, the manifest says {size} bytes" in lines[2]
    assert "__1_0.distcp is missing" in lines[3]
    assert "notes.txt is not in the manifest" in lines[4]


def test_the_reader_names_every_bad_file_at_once(newest: Path) -> None:
    (newest / "__1_0.distcp").unlink()
    (newest / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(DamagedCheckpoint) as caught:
        CheckpointReader(newest)
    assert "__1_0.distcp is missing" in str(caught.value) and "__0_0.distcp has 0 bytes" in str(caught.value)


def test_odd_names_are_refused_with_a_message(run: Path, newest: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    for name, why in {
        "x" * 300: "cannot be opened",
        "loop": "a link to nothing",
        "nothing": "a link to nothing",
    }.items():
        with pytest.raises(UserError, match=why):
            resolve(tmp_path / name)
    (tmp_path / "best").symlink_to(newest)
    shutil.copytree(newest, tmp_path / "a copy")
    for name in ("best", "a copy"):
        assert CheckpointReader(tmp_path / name).progress.step == 10
