"""Any data files: every sample can be read and holds ids of the vocabulary, or the files are refused by name."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqt_dist.data.dataset import build_datasets
from tests.fuzz.damage import NUMBERS, VOCAB_SIZE, budget, changed_bytes, changed_values, held

HEADER = struct.Struct("<9sQBQQ")


@pytest.fixture(scope="module")
def folder(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each input is put together."""
    return tmp_path_factory.mktemp("fuzz")


def whole(prepared: Path, folder: Path) -> None:
    """The good files in `folder`, and nothing that an input before left there."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in prepared.iterdir():
        shutil.copy(path, folder)


def use(folder: Path, num_samples: int = 40, seed: int = 1) -> None:
    """Opens the data as a run does and reads all samples."""
    train, valid, _ = build_datasets(
        train=[(str(folder / "train"), 1.0)],
        valid=None,
        valid_fraction=0.1,
        sequence_length=8,
        vocab_size=VOCAB_SIZE,
        tokenizer_path=folder / "tokenizer.model",
        seed=seed,
        num_train_samples=num_samples,
        num_valid_samples=4,
        cache_dir=folder / "cache",
        build_here=True,
        barrier=lambda: None,
    )
    assert valid is not None
    for dataset, length in ((train, num_samples), (valid, 4)):
        for number in range(length):
            tokens = dataset[number]["tokens"]
            assert tokens.shape == (8,) and tokens.min() >= 0 and tokens.max() < VOCAB_SIZE


def names(folder: Path) -> Any:
    """Whether a message names one of the files of the data."""
    return lambda message: str(folder / "train") in message and len(message) > len(str(folder / "train")) + 10


@budget(60, share=0.1)
@given(data=st.data(), name=st.sampled_from(["train.idx", "train.idx", "train.bin", "train.json"]))
def test_whatever_the_bytes(prepared: Path, folder: Path, data: Any, name: str) -> None:
    whole(prepared, folder)
    (folder / name).write_bytes(data.draw(changed_bytes((prepared / name).read_bytes())))
    held(lambda: use(folder), names(folder))


def fitting(values: np.ndarray, place: int, number: Any) -> np.ndarray:
    """`values` with `number` at `place`, in the type that they have."""
    limits = np.iinfo(values.dtype)
    changed = values.copy()
    changed[place % len(changed)] = min(max(int(number), limits.min), limits.max)
    return changed


INTEGERS = NUMBERS.filter(lambda number: isinstance(number, int))


@budget(80, share=0.1)
@given(
    changes=st.lists(
        st.tuples(st.sampled_from(["head", "lengths", "offsets", "bounds"]), st.integers(0, 99), INTEGERS), max_size=3
    )
)
def test_whatever_the_index_says(prepared: Path, folder: Path, changes: list[tuple[str, int, int]]) -> None:
    """Whole numbers of the index are others, while its length fits its head."""
    whole(prepared, folder)
    data = (prepared / "train.idx").read_bytes()
    magic, *head = HEADER.unpack_from(data)
    sequences = head[2]
    parts = {
        "head": np.array(head, np.uint64),
        "lengths": np.frombuffer(data, np.int32, sequences, HEADER.size),
        "offsets": np.frombuffer(data, np.int64, sequences, HEADER.size + 4 * sequences),
        "bounds": np.frombuffer(data, np.int64, sequences + 1, HEADER.size + 12 * sequences),
    }
    for part, place, number in changes:
        parts[part] = fitting(parts[part], place, number)
    version, code, *counts = parts.pop("head").tolist()
    head_bytes = HEADER.pack(magic, version, code % 256, *counts)
    (folder / "train.idx").write_bytes(head_bytes + b"".join(part.tobytes() for part in parts.values()))
    held(lambda: use(folder), names(folder))


@budget(80, share=0.1)
@given(data=st.data())
def test_whatever_the_manifest_says(prepared: Path, folder: Path, data: Any) -> None:
    whole(prepared, folder)
    good = json.loads((prepared / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(data.draw(changed_values(good, most=2))))
    held(lambda: use(folder), names(folder))


@budget(40, share=0.05)
@given(data=st.data())
def test_whatever_is_known_of_the_ids(prepared: Path, folder: Path, data: Any) -> None:
    """NAME.ids.json: what is not of the data is made anew."""
    whole(prepared, folder)
    use(folder)
    known = folder / "train.ids.json"
    known.write_text(json.dumps(data.draw(changed_values(json.loads(known.read_text()), most=2))))
    held(lambda: use(folder), names(folder))


@budget(20, share=0.01)
@given(num_samples=NUMBERS.filter(lambda number: isinstance(number, int) and 2**40 <= number < 2**126))
def test_more_samples_than_an_index_can_have(prepared: Path, folder: Path, num_samples: int) -> None:
    whole(prepared, folder)
    held(lambda: use(folder, num_samples), lambda message: "training.steps" in message)
