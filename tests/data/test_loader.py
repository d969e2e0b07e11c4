"""Samples and their order: every token once an epoch, a function of seed and step alone, the same for every layout."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pytest
import torch

from dqt_dist.data.dataset import build_datasets, build_epoch_indices
from dqt_dist.data.indexed import IndexedWriter, encode_documents, quiet_megatron_import
from dqt_dist.data.loader import Loader
from dqt_dist.errors import UserError
from tests.data.conftest import VOCAB_SIZE

with quiet_megatron_import():
    from megatron.core.datasets.indexed_dataset import IndexedDataset

ROOT = Path(__file__).resolve().parents[2]
SEQUENCE_LENGTH = 61  # odd, so that samples and documents never line up


@pytest.fixture
def build(prepared, tmp_path: Path):
    def build(num_train_samples: int = 200, **changes):
        arguments = {
            "train": [(prepared.train, 1.0)], "valid": [(prepared.other, 1.0)], "valid_fraction": 0.0,
            "sequence_length": SEQUENCE_LENGTH, "vocab_size": VOCAB_SIZE, "tokenizer_path": prepared.tokenizer.path,
            "seed": 7, "num_train_samples": num_train_samples, "num_valid_samples": 40, "cache_dir": tmp_path / "cache",
            "build_here": True, "barrier": lambda: None,
        }  # fmt: skip
        return build_datasets(**(arguments | changes))[:2]

    return build


def rows(dataset, numbers=None) -> list[tuple[int, ...]]:
    """The SEQUENCE_LENGTH + 1 tokens of each sample."""
    samples = (dataset[i] for i in (range(len(dataset)) if numbers is None else numbers))
    return [(*s["tokens"].tolist(), int(s["labels"][-1])) for s in samples]


def num_tokens(prefix: str) -> int:
    indexed = IndexedDataset(prefix)  # must outlive its arrays, as it closes the file under its arrays
    return int(indexed.sequence_lengths.sum())


def num_epoch_samples(prefix: str) -> int:
    return (num_tokens(prefix) - 1) // SEQUENCE_LENGTH


def test_huge_weights_are_shares_like_others(prepared, build):
    """Their sum is no float."""
    blends = [[(prepared.train, weight), (prepared.other, weight)] for weight in (1.0, 1e308)]
    few, many = (rows(build(40, train=blend)[0]) for blend in blends)
    assert few == many
    with pytest.raises(UserError, match=r"data.train\[1\].weight: is inf, must be a number above 0"):
        build(40, train=[(prepared.train, 1.0), (prepared.other, float("inf"))])


# ---------------------------------------------------------------- the dataset


def test_first_epoch_is_the_stream_of_shuffled_documents_once(prepared, build):
    """Samples put back in stream order are the documents, each once and whole."""
    count = num_epoch_samples(prepared.train)
    dataset, _ = build(count)
    stream: list[int] = [0] * (count * SEQUENCE_LENGTH + 1)
    for row, number in zip(rows(dataset), dataset.shuffle_index[:count], strict=True):
        start = int(number) * SEQUENCE_LENGTH
        stream[start : start + SEQUENCE_LENGTH + 1] = row
    indexed = IndexedDataset(prepared.train)
    order = dataset.document_index[: len(indexed)]
    expected = np.concatenate([indexed[int(i)] for i in order])
    assert stream == expected[: len(stream)].tolist()
    assert len(expected) - len(stream) < SEQUENCE_LENGTH
    assert sorted(order) == list(range(len(indexed))) and list(order) != sorted(order)
    assert list(dataset.shuffle_index[:count]) != sorted(dataset.shuffle_index[:count])


def test_labels_are_the_next_tokens_and_all_count(build):
    sample = build()[0][3]
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
    assert torch.equal(sample["loss_mask"], torch.ones(SEQUENCE_LENGTH))


def test_a_longer_run_begins_with_the_same_samples(prepared, build):
    """Also over epochs, where Megatron's own order changes with the number of samples (the negative control below)."""
    epoch = num_epoch_samples(prepared.train)
    longest = rows(build(5 * epoch)[0])
    for count in (1, 50, epoch - 1, epoch, epoch + 1, 2 * epoch + 30, 4 * epoch):
        assert rows(build(count)[0]) == longest[:count]


def test_megatrons_own_order_does_change_with_the_number_of_samples(prepared, tmp_path: Path):
    """The negative control of the test above, and why EpochDataset exists. When this fails, EpochDataset can go."""
    with quiet_megatron_import():
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.utils import Split
    config = GPTDatasetConfig(
        random_seed=7, sequence_length=SEQUENCE_LENGTH, blend=([prepared.train], None), split="1",
        reset_position_ids=False,
        tokenizer=type("Tokenizer", (), {"vocab_size": VOCAB_SIZE, "eod": 2, "unique_identifiers": {}})(),
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False, path_to_cache=str(tmp_path),
    )  # fmt: skip
    indexed = IndexedDataset(prepared.train)
    documents = np.arange(len(indexed), dtype=np.int32)
    epoch = num_epoch_samples(prepared.train)
    one, three = (GPTDataset(indexed, prepared.train, documents, n * epoch, Split.train, config) for n in (1, 3))
    assert rows(one, range(50)) != rows(three, range(50))


def test_each_epoch_has_every_sample_once_in_its_own_order():
    lengths = np.array([5, 1, 30, 7, 12, 2], dtype=np.int32)
    documents = np.arange(6, dtype=np.int32)
    document_index, sample_index, shuffle_index = build_epoch_indices(lengths, documents, 9, 4, seed=3)
    assert len(sample_index) - 1 == len(shuffle_index) == (9 * 57 - 1) // 4
    assert sorted(shuffle_index) == list(range(len(shuffle_index)))
    epochs = document_index.reshape(9, 6)
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    # Sample i starts at token i * 4 of the stream.
    starts = np.concatenate([[0], np.cumsum(lengths[document_index])])
    assert [starts[d] + o for d, o in sample_index] == [4 * i for i in range(len(sample_index))]
    # Samples do not leave their epoch: those complete within epoch e come before all later ones.
    for epoch in range(1, 9):
        complete = (epoch * 57 - 1) // 4
        assert set(shuffle_index[:complete]) == set(range(complete))


def test_epochs_shorter_than_a_sample_still_make_samples():
    lengths = np.array([3, 4], dtype=np.int32)
    _, sample_index, shuffle_index = build_epoch_indices(lengths, np.arange(2, dtype=np.int32), 5, 16, seed=0)
    assert len(shuffle_index) == (5 * 7 - 1) // 16 == len(sample_index) - 1


def test_order_depends_on_the_seed_alone(build, tmp_path: Path):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = rows(build()[0])
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert rows(build(cache_dir=tmp_path / "another")[0]) == first
    assert rows(build(seed=8)[0]) != first
    assert rows(build(seed=7 + 2**32)[0]) != first  # the high word counts as well


def test_cached_index_is_read_by_those_who_do_not_build(build, tmp_path: Path):
    built = rows(build()[0])
    assert rows(build(build_here=False)[0]) == built
    assert not list((tmp_path / "cache").glob(".partial*"))
    with pytest.raises(UserError, match="must be the same for all processes of a node"):
        build(build_here=False, cache_dir=tmp_path / "elsewhere")


def test_others_read_after_the_barrier_only(build, tmp_path: Path):
    def barrier() -> None:
        assert not (tmp_path / "cache").exists()
        build()  # what the building process of the node does meanwhile

    waited, _ = build(build_here=False, barrier=barrier)
    assert len(waited) == 200


def test_data_prepared_again_get_a_new_index(copied: Path, prepared, build):
    """The same documents in another order leave the sizes of both files as they were.

    An index of the old lengths would cut the new documents in wrong places.
    """
    before = rows(build(train=[(str(copied), 1.0)])[0])
    sizes = [Path(f"{copied}{suffix}").stat().st_size for suffix in (".bin", ".idx")]
    writer = IndexedWriter(copied, prepared.tokenizer, request="tests")
    for batch in encode_documents(prepared.documents[::-1], prepared.tokenizer.path, workers=1):
        writer.add_batch(batch)
    writer.finish()
    assert sizes == [Path(f"{copied}{suffix}").stat().st_size for suffix in (".bin", ".idx")]
    after = rows(build(train=[(str(copied), 1.0)])[0])
    assert after == rows(build(train=[(str(copied), 1.0)], cache_dir=copied.parent / "fresh")[0]) != before


def test_blend_follows_its_weights_and_does_not_look_ahead(prepared, build):
    blend = [(prepared.train, 3.0), (prepared.other, 1.0)]
    dataset, _ = build(400, train=blend)
    assert len(dataset) == 400
    assert Counter(int(dataset[i]["dataset_id"]) for i in range(400)) == {0: 300, 1: 100}
    # Each source keeps its own order.
    alone = rows(build(100, train=[(prepared.other, 1.0)])[0])
    assert [row for i, row in enumerate(rows(dataset)) if int(dataset[i]["dataset_id"]) == 1] == alone
    assert rows(build(123, train=blend)[0]) == rows(dataset)[:123]


def starts_of(sample) -> list[int]:
    """Where its documents begin, each once."""
    starts = sample["document_starts"].tolist()
    assert starts == sorted(starts) and starts[0] == 0
    return sorted(set(starts) - {SEQUENCE_LENGTH})


def test_a_document_begins_with_the_mark_before_it(prepared, build):
    """All samples of a blend, several epochs of the smaller source. Masking changes nothing else in a sample."""
    blend = [(prepared.train, 3.0), (prepared.other, 1.0)]
    masked, plain = (build(400, train=blend, document_masking=masking)[0] for masking in (True, False))
    for number in range(400):
        sample = masked[number]
        marks = (sample["tokens"] == prepared.tokenizer.eod_id).nonzero().flatten().tolist()
        assert starts_of(sample) == sorted({0, *marks})
        assert {name: value.tolist() for name, value in plain[number].items()} == {
            name: value.tolist() for name, value in sample.items() if name != "document_starts"
        }
    assert len({len(masked[number]["document_starts"]) for number in range(400)}) == 1


def test_documents_without_marks_begin_where_the_index_says(tmp_path: Path):
    """Each document is one id over and over; 2, the mark, ends some. Some documents are longer than a sample, some have
    one token."""
    with quiet_megatron_import():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    random.seed(5)
    builder = IndexedDatasetBuilder(str(tmp_path / "plain.bin"), dtype=np.uint16)
    for number in range(3, 303):
        length = random.choice([1, 1, 2, 3, 20, 150])
        ids = [number] * length if number % 3 else [*[number] * length, 2]
        builder.add_document(np.array(ids, dtype=np.uint16), [len(ids)])
    builder.finalize(str(tmp_path / "plain.idx"))
    dataset = build_datasets(
        train=[(str(tmp_path / "plain"), 1.0)], valid=None, valid_fraction=0.0, sequence_length=SEQUENCE_LENGTH,
        vocab_size=303, tokenizer_path=None, document_masking=True, seed=7, num_train_samples=200, num_valid_samples=0,
        cache_dir=tmp_path / "cache", build_here=True, barrier=lambda: None,
    ).train  # fmt: skip
    dataset.config.tokenizer.eod = 2
    seen = set()
    for number in range(200):
        sample = dataset[number]
        row = sample["tokens"].tolist()
        without_mark = {i for i in range(1, SEQUENCE_LENGTH) if 2 not in row[i - 1 : i + 1] and row[i - 1] != row[i]}
        assert starts_of(sample) == sorted({0} | {i for i, token in enumerate(row) if token == 2} | without_mark)
        seen |= set(row)
    assert len(seen) > 290


def test_validation_is_the_same_for_every_seed_and_number_of_steps(build):
    fixed = rows(build()[1])
    assert len(fixed) == 40
    assert rows(build(999, seed=99)[1]) == fixed
    assert rows(build(num_valid_samples=60)[1])[:40] == fixed


def test_held_out_documents_are_not_trained_on(prepared, build):
    train, valid = build(50, valid=None, valid_fraction=0.25)
    both = [set(map(int, dataset.indices)) for dataset in (train, valid)]
    assert both[0] | both[1] == set(range(len(prepared.documents)))
    assert not both[0] & both[1]
    assert len(both[1]) == round(0.25 * len(prepared.documents))
    # The same documents whatever the seed of training.
    assert list(build(50, valid=None, valid_fraction=0.25, seed=1)[1].indices) == list(valid.indices)
    assert build(50, valid=None, valid_fraction=0.0)[1] is None
    assert build(50, num_valid_samples=0)[1] is None


def test_wrong_input_gives_the_field_and_both_numbers(prepared, build):
    with pytest.raises(
        UserError, match=f"has {VOCAB_SIZE} pieces, but model.vocab_size is 599; set model.vocab_size to"
    ):
        build(vocab_size=VOCAB_SIZE - 1)
    with pytest.raises(UserError, match=r"data\.train\[1\]\.weight: is 0"):
        build(train=[(prepared.train, 1.0), (prepared.other, 0)])
    with pytest.raises(UserError, match=r"data\.valid\[0\]\.path: neither"):
        build(valid=[("nowhere", 1.0)])
    tokens = num_tokens(prepared.other)
    assert build(10, train=[(prepared.other, 1.0)], sequence_length=tokens - 1)  # just enough for one sample
    with pytest.raises(
        UserError, match=rf"has {tokens} tokens, but one sample takes model.seq_length \+ 1 = {tokens + 1}"
    ):
        build(10, train=[(prepared.other, 1.0)], sequence_length=tokens)
    for field, numbers in {"training.steps": (10**12,), "training.eval_batches": (10, 10**12)}.items():
        with pytest.raises(UserError, match=rf"^{field}: 1000000000000 samples of .* whose index takes .* GiB"):
            build(numbers[0], num_valid_samples=numbers[-1] if len(numbers) == 2 else 0)


# ---------------------------------------------------------------- the loader


def loader(
    dataset, rank: int = 0, size: int = 1, micro_batch_size: int = 2, global_batch_size: int = 24, **options
) -> Loader:
    return Loader(
        dataset, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size, data_parallel_rank=rank,
        data_parallel_size=size, **options,
    )  # fmt: skip


def flat(step: list[dict[str, torch.Tensor]]) -> list[tuple[int, ...]]:
    return [(*t.tolist(), int(la[-1])) for mb in step for t, la in zip(mb["tokens"], mb["labels"], strict=True)]


@pytest.mark.parametrize(("size", "micro_batch_size"), [(1, 24), (1, 1), (2, 3), (3, 4), (4, 2), (12, 2)])
def test_ranks_partition_each_step_whatever_their_number(build, size, micro_batch_size):
    dataset, _ = build(100)  # 4 whole steps of 24, and 4 samples that make no step
    steps: list[Iterator] = [loader(dataset, r, size, micro_batch_size).iterate(0) for r in range(size)]
    expected = rows(dataset)
    for step, of_ranks in enumerate(zip(*steps, strict=True)):
        wanted = expected[step * 24 : (step + 1) * 24]
        for rank, micro_batches in enumerate(of_ranks):
            assert len(micro_batches) == 24 // (size * micro_batch_size)
            for m, micro_batch in enumerate(micro_batches):
                first = m * size * micro_batch_size + rank * micro_batch_size
                assert flat([micro_batch]) == wanted[first : first + micro_batch_size]
        assert sorted(row for mbs in of_ranks for row in flat(mbs)) == sorted(wanted)
    assert step == 3


@pytest.mark.parametrize("masking", [False, True])
def test_micro_batches_have_the_promised_shapes(build, masking: bool):
    dataset = build(document_masking=masking)[0]
    micro_batch = next(loader(dataset).iterate(0))[0]
    documents = {"document_starts": ((2, dataset.most_documents), torch.int32)} if masking else {}
    assert {k: (v.shape, v.dtype) for k, v in micro_batch.items()} == documents | {
        "tokens": ((2, SEQUENCE_LENGTH), torch.int64),
        "labels": ((2, SEQUENCE_LENGTH), torch.int64),
        "loss_mask": ((2, SEQUENCE_LENGTH), torch.float32),
    }


def test_resuming_at_a_step_is_skipping_to_it_and_reads_nothing_else(build):
    dataset, _ = build()

    class Counting(torch.utils.data.Dataset):
        read: ClassVar[list[int]] = []

        def __len__(self) -> int:
            return len(dataset)

        def __getitem__(self, index: int):
            self.read.append(index)
            return dataset[index]

    resumed = [flat(step) for step in loader(Counting()).iterate(5 * 24)]
    assert Counting.read == list(range(5 * 24, 8 * 24))
    assert resumed == [flat(step) for step in islice(loader(dataset).iterate(0), 5, None)]
    assert len(resumed) == 3


def test_another_global_batch_goes_on_where_the_data_stopped(build):
    """3 steps of 24, then steps of 32 on 2 ranks: no sample twice, none left out."""
    dataset, _ = build()
    expected = rows(dataset)
    first = [row for step in islice(loader(dataset).iterate(0), 3) for row in flat(step)]
    ranks = [loader(dataset, rank, 2, global_batch_size=32).iterate(72) for rank in range(2)]
    steps = [sorted(row for of_rank in step for row in flat(of_rank)) for step in zip(*ranks, strict=True)]
    assert first == expected[:72]
    assert steps == [sorted(expected[start : start + 32]) for start in (72, 104, 136, 168)]


def test_worker_processes_give_the_same_and_leave_random_states_alone(build):
    dataset, _ = build()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    plain = [flat(step) for step in loader(dataset).iterate(2 * 24)]
    assert len(plain) == 6
    assert [flat(step) for step in loader(dataset, num_workers=2).iterate(2 * 24)] == plain
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_batches_that_do_not_fit_are_refused(build):
    dataset, _ = build(20)
    with pytest.raises(
        UserError, match=r"24 is not a multiple of data parallel size 5 \* training.micro_batch_size 2 = 10"
    ):
        loader(dataset, size=5)
    with pytest.raises(UserError, match="24 is more than the dataset's 20 samples"):
        loader(dataset)


SIGNALLED = """
import os, signal, sys
import psutil
import torch
from dqt_dist.data.loader import Loader

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return {name: torch.full((2,), float(index)) for name in ("tokens", "labels", "loss_mask")}

if __name__ == "__main__":
    caught = []
    signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
    loader = Loader(Numbers(), micro_batch_size=1, global_batch_size=1, data_parallel_rank=0, data_parallel_size=1,
                    num_workers=2)
    steps = loader.iterate()
    seen = [float(next(steps)[0]["tokens"][0, 0])]
    children = psutil.Process().children(recursive=True)
    for process in [*children, psutil.Process()]:
        process.send_signal(signal.SIGTERM)
    seen += [float(step[0]["tokens"][0, 0]) for step in steps]
    assert len(children) >= 3, children  # the server and two workers
    assert seen == [float(i) for i in range(40)] and caught == [1]
"""


def test_workers_outlive_the_signal_that_stops_a_run(tmp_path: Path) -> None:
    """Sent to every process of a job; the run itself sees it and goes on to save."""
    script = tmp_path / "script.py"
    script.write_text(SIGNALLED)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr


KILLED = (
    SIGNALLED[: SIGNALLED.index("if __name__")]
    + """
if __name__ == "__main__":
    loader = Loader(Numbers(), micro_batch_size=1, global_batch_size=1, data_parallel_rank=0, data_parallel_size=1,
                    num_workers=2)
    steps = loader.iterate()
    next(steps)
    print(*(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
)


def test_no_process_is_left_of_a_run_that_was_killed(tmp_path: Path) -> None:
    """Whoever reads the run's output waits for its end, which never comes while a worker is left behind."""
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == -signal.SIGKILL, done.stderr
    children = [int(pid) for pid in done.stdout.split()]
    assert len(children) >= 3
    deadline = time.monotonic() + 30
    while left := [pid for pid in children if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


DAMAGED = (
    SIGNALLED[: SIGNALLED.index("if __name__")]
    + """
class Damaged(Numbers):
    def __getitem__(self, index):
        if index == 5:
            raise OSError("the disk is gone")
        return super().__getitem__(index)

if __name__ == "__main__":
    loader = Loader(Damaged(), micro_batch_size=1, global_batch_size=1, data_parallel_rank=0, data_parallel_size=1,
                    num_workers=2)
    for step in loader.iterate():
        pass
"""
)


def test_a_process_whose_data_are_damaged_ends(tmp_path: Path) -> None:
    """Without the end of the iterator it waits at its exit, for ever, for workers that ignore the signal to end."""
    script = tmp_path / "script.py"
    script.write_text(DAMAGED)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1 and "OSError: the disk is gone" in done.stderr
