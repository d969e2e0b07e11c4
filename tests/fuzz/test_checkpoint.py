"""Any manifest and any .metadata, by their values: the tensors can be read, or the file is refused by name. And any run
folder: `store.find` takes a checkpoint that is whole, or refuses all by name.

`tests/checkpoint/test_damage.py` changes their bytes and tells lies that somebody thought of; here every value of both
is exchanged for others, and digests that a change would make wrong are made right again.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import TensorProperties

from dqt_dist.checkpoint import store
from dqt_dist.checkpoint.digest import digest_of
from dqt_dist.checkpoint.folder import MANIFEST, METADATA, manifest_digest, step_of
from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.checkpoint.run_tokenizer import check_tokenizer
from dqt_dist.checkpoint.storage import CheckpointFiles
from dqt_dist.checkpoint.store import check_identity
from dqt_dist.data.tokenizer import Tokenizer, load_tokenizer
from dqt_dist.errors import UserError
from tests.checkpoint.damage import rewrite_manifest
from tests.checkpoint.states import own_rows, whole_tensors, write
from tests.distributed import run_distributed
from tests.fuzz.damage import JUNK, TEXTS, budget, changed_bytes, changed_values, held
from tests.small import small_config


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint by two ranks."""
    folder = tmp_path_factory.mktemp("run")
    run_distributed(write, 2, str(folder), [5, 10])
    return folder / "checkpoints" / "step_00000010"


@pytest.fixture(scope="module")
def damaged(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, of which each input replaces a file."""
    return Path(shutil.copytree(good, tmp_path_factory.mktemp("fuzz") / good.name))


def use(path: Path, tokenizer: Tokenizer) -> None:
    """What resuming and the tools do with a checkpoint, but for the model that it fills."""
    reader = CheckpointReader(path)
    for name in reader.tensors:
        reader.read(name)
    digest_of(reader)
    check_identity(reader.manifest, small_config(), path)
    check_tokenizer(tokenizer, reader.manifest, path, path.parent, "data.tokenizer")


def names(path: Path) -> Any:
    return lambda message: str(path) in message and len(message) > len(str(path)) + 20


@budget(100, share=0.1)
@given(data=st.data(), digested=st.booleans())
def test_whatever_the_manifest_says(good: Path, damaged: Path, prepared: Path, data: Any, digested: bool) -> None:
    """With its own digest made right, as an attacker would, or left out, as in manifests of before."""
    shutil.copy(good / METADATA, damaged)
    manifest = json.loads((good / MANIFEST).read_text())
    del manifest["sha256"]
    manifest = data.draw(changed_values(manifest, most=3))
    own = {"sha256": manifest_digest(manifest)} if digested else {}
    (damaged / MANIFEST).write_text(json.dumps(manifest | own))
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
    held(lambda: use(damaged, tokenizer), names(damaged))


def exchange(value: Any, draw: Any) -> Any:
    """`value`, an object of .metadata, with something inside replaced; goes down at random."""
    if isinstance(value, TensorProperties):
        return draw(JUNK)  # another value inside cannot be pickled
    parts = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list) and value:
        parts = dict(enumerate(value))
    if not parts or draw(st.integers(0, 3)) == 0:
        return draw(JUNK)
    key = draw(st.sampled_from(list(parts)))
    new = exchange(parts[key], draw)
    if isinstance(value, (tuple, list)):
        return type(value)(new if place == key else part for place, part in parts.items())
    if isinstance(value, dict):
        value[key] = new
    else:
        object.__setattr__(value, key, new)
    return value


@budget(100, share=0.1)
@given(data=st.data())
def test_whatever_the_metadata_say(good: Path, damaged: Path, prepared: Path, data: Any) -> None:
    shutil.copy(good / MANIFEST, damaged)
    metadata = pickle.loads((good / METADATA).read_bytes())
    (damaged / METADATA).write_bytes(pickle.dumps(exchange(metadata, data.draw)))
    rewrite_manifest(damaged)
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
    held(lambda: use(damaged, tokenizer), names(damaged))


# ---- what a run finds in its folder ----


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """A process group of this process, which `store.find` talks to."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def resume(run: Path, resume: str, tokenizer: Tokenizer) -> store.Checkpoint | None:
    """What a start does with a run folder, but for the model that it fills."""
    config = small_config("quantization.latent_bits=4", f"checkpoint.dir={run}")
    found = store.find(config, resume)
    store.start_of(found)
    store.check_tokenizer_of(found, tokenizer)
    if found is not None:
        check_identity(found.manifest, config, found.path)
        files = CheckpointFiles(found.path, found.manifest["files"])
        store._check_tensors(own_rows(whole_tensors()), files.metadata, found.path)
        store.set_aside(config, found)
    return found


def replaced(place: Path, other: Callable[[Path], object]) -> None:
    """`other` makes something with the name of a file or folder that was there."""
    shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
    other(place)


OTHERS: list[Callable[[Path], object]] = [
    lambda place: None,
    lambda place: place.mkdir(),
    lambda place: place.write_bytes(b""),
    lambda place: place.write_bytes(b"[" * 100_000),
    lambda place: place.symlink_to("nowhere"),
    lambda place: place.symlink_to(place.name),
    lambda place: place.symlink_to("/dev/zero"),
    os.mkfifo,
]
"""What may stand in the place of a file or a folder."""


@st.composite
def damage(draw: st.DrawFn, checkpoint: Path) -> Callable[[Path], str | None]:
    """Does something to the copy of `checkpoint` that it is called with."""
    name = draw(st.sampled_from([MANIFEST, MANIFEST, METADATA, "__0_0.distcp", "."]))
    kind = draw(st.sampled_from(["bytes", "values", "other"]))
    if kind == "bytes" and name != ".":
        data = draw(changed_bytes((checkpoint / name).read_bytes()))
        return lambda copy: (copy / name).write_bytes(data) and None
    if kind == "values":
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        del manifest["sha256"]
        manifest = draw(changed_values(manifest, most=2))
        own = {"sha256": manifest_digest(manifest)} if draw(st.booleans()) else {}
        return lambda copy: (copy / MANIFEST).write_text(json.dumps(manifest | own)) and None
    other = draw(st.sampled_from(OTHERS))
    return lambda copy: replaced(copy / name if name != "." else copy, other)


@budget(120, share=0.1)
@given(data=st.data(), steps=st.sets(st.sampled_from([5, 10]), min_size=1), newest=st.booleans())
def test_whatever_a_run_folder_holds(
    one_rank: None,
    good: Path,
    prepared: Path,
    tmp_path_factory: pytest.TempPathFactory,
    data: Any,
    steps: Any,
    newest: bool,
) -> None:
    """One or both checkpoints are damaged. `auto` never passes over one that is as it was written."""
    run = tmp_path_factory.mktemp("found")
    shutil.copytree(good.parent, run / "checkpoints")
    for step in sorted(steps):
        data.draw(damage(good.parent / f"step_{step:08d}"))(run / "checkpoints" / f"step_{step:08d}")
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
    asked = str(run / "checkpoints" / "step_00000010") if newest else "auto"
    found = held(lambda: resume(run, asked, tokenizer), names(run / "checkpoints"))
    if newest or 10 not in steps:
        assert found is None or step_of(found.path) == 10
    if 10 not in steps:
        assert found is not None
    shutil.rmtree(run)


@budget(60, share=0.02)
@given(given_path=TEXTS.filter(lambda text: "\0" not in text and text not in ("", "auto", "none")))
def test_whatever_path_is_given(one_rank: None, prepared: Path, tmp_path_factory: Any, given_path: str) -> None:
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
    shown = str(UserError(str(Path(given_path))))
    held(lambda: resume(Path("nowhere"), given_path, tokenizer), lambda message: message.startswith(f"{shown}: "))
