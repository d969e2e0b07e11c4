"""The digest changes with every bit of the state and with nothing else. test_layouts.py compares layouts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dqt_dist.checkpoint.digest import PARTS, digest, digest_of, part_of
from dqt_dist.checkpoint.folder import Progress
from dqt_dist.checkpoint.reader import CheckpointReader
from tests.checkpoint.states import MATRIX, progress_at, whole_tensors, write
from tests.distributed import run_distributed

START = progress_at(3)


def changed_parts(tensors: dict[str, torch.Tensor], progress: Progress = START) -> set[str]:
    """The parts of the digest in which this state differs from the usual one; the total must differ with them."""
    usual, other = digest(whole_tensors().items(), START), digest(tensors.items(), progress)
    parts = {part for part, value in usual.parts.items() if other.parts[part] != value}
    assert (usual.total != other.total) == bool(parts)
    return parts


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (f"codes/{MATRIX}", "codes"),
        (f"scale/{MATRIX}", "scales"),
        (f"latent/{MATRIX}", "latents"),
        (f"latent_scale/{MATRIX}", "latents"),
        (f"low_bit.exp_avg/{MATRIX}", "moments"),
        ("parameter/norm", "parameters"),
        ("parameter.exp_avg/norm", "parameters"),
    ],
)
def test_one_bit_of_any_tensor_changes_its_part_alone(name: str, part: str) -> None:
    for place, bit in ((0, 0), (-1, 7)):
        tensors = whole_tensors()
        tensors[name].view(torch.uint8).view(-1)[place] ^= 1 << bit
        assert changed_parts(tensors) == {part}


@pytest.mark.parametrize("counter", ["step", "tokens", "samples"])
def test_each_counter_changes_the_progress_alone(counter: str) -> None:
    later = replace(START, **{counter: getattr(START, counter) + 1})
    assert changed_parts(whole_tensors(), later) == {"progress"}


def test_a_tensor_more_a_name_and_a_shape_count() -> None:
    tensors = whole_tensors()
    assert changed_parts(tensors | {"codes/another": torch.zeros(0, 4, dtype=torch.uint8)}) == {"codes"}
    tensors["parameter/other"] = tensors.pop("parameter/norm")
    assert changed_parts(tensors) == {"parameters"}
    tensors = whole_tensors()
    tensors["parameter/norm"] = tensors["parameter/norm"].view(1, -1)
    assert changed_parts(tensors) == {"parameters"}


def test_neither_order_nor_memory_layout_count() -> None:
    turned = {name: tensor.t().contiguous().t() for name, tensor in reversed(whole_tensors().items())}
    assert not turned[f"codes/{MATRIX}"].is_contiguous() and changed_parts(turned) == set()


def test_the_definition_by_hand() -> None:
    """The docstring of digest.py, applied to two tensors with hashlib alone."""
    tensors = {"scale/b": torch.tensor([[2.0]]), "scale/a": torch.tensor([[0.5]])}

    def sha(*data: bytes) -> bytes:
        return hashlib.sha256(b"".join(data)).digest()

    a = sha(b'["scale/a", "float32", [1, 1]]\n', bytes([0, 0, 0, 0x3F]))
    b = sha(b'["scale/b", "float32", [1, 1]]\n', bytes([0, 0, 0, 0x40]))
    progress = sha(json.dumps({"step": 3, "tokens": 300, "samples": 36}).encode(), b"\n")
    found = digest(tensors.items(), START)
    assert found.parts == {
        "codes": sha().hex(),
        "scales": sha(a, b).hex(),
        "moments": sha().hex(),
        "parameters": sha().hex(),
        "progress": progress.hex(),
    }
    assert found.total == sha(sha(), sha(a, b), sha(), sha(), progress).hex()


def test_every_tensor_belongs_to_a_part() -> None:
    assert {part_of(name) for name in whole_tensors()} == set(PARTS)
    with pytest.raises(ValueError, match="belongs to no part"):
        part_of("something_new/norm")


def test_the_same_state_from_another_number_of_files_is_the_same(tmp_path: Path) -> None:
    digests = []
    for ranks in (1, 3):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        run_distributed(write, ranks, str(folder), [3])
        reader = CheckpointReader(folder)
        assert len(reader.manifest["files"]) == ranks + 1
        digests.append(digest_of(reader))
    assert digests[0] == digests[1] == digest(whole_tensors().items(), START)
