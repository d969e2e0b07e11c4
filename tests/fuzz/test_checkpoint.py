"""Any manifest and any .metadata, by their values: the tensors can be read, or the file is refused by name.

`tests/checkpoint/test_damage.py` changes their bytes and tells lies that somebody thought of; here every value of both
is exchanged for others, and digests that a change would make wrong are made right again.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import TensorProperties

from dqt_dist.checkpoint.digest import digest_of
from dqt_dist.checkpoint.folder import MANIFEST, METADATA, manifest_digest
from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.checkpoint.run_tokenizer import check_tokenizer
from dqt_dist.checkpoint.store import check_identity
from dqt_dist.data.tokenizer import Tokenizer, load_tokenizer
from tests.checkpoint.damage import rewrite_manifest
from tests.checkpoint.states import write
from tests.distributed import run_distributed
from tests.fuzz.damage import JUNK, budget, changed_values, held
from tests.small import small_config


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint by two ranks."""
    folder = tmp_path_factory.mktemp("run")
    run_distributed(write, 2, str(folder), [10])
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
