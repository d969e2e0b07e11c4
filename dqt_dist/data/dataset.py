"""Token files to training samples, through megatron.core.datasets, in an order that never changes.

A sample is `sequence_length + 1` consecutive tokens of the stream that all documents make when laid end to end; inputs
are the first `sequence_length`, labels the last. Documents are packed: a sample may hold the end of one, the mark eod
and the beginning of the next. With document masking (data.document_masking) a sample says where its documents begin:

    inputs             e  f </s> a  b  c </s>  x  y          document_starts    0, 2, 6
    labels             f </s> a  b  c </s> x   y  z

The lengths in the index say where a document begins. The mark before it, where there is one, belongs to it: an input is
of the document of its label. So no label is predicted from another document, the loss leaves none out, and a document
is read as tools/evaluate.py, lm-eval and llama.cpp give it to a model, after one mark. (Megatron's reset_attention_mask
looks for the mark's id and ends documents after it: the mark then predicts the first token of a document from the
document before.)

The order. Megatron's GPTDataset shuffles all epochs of a run together, so which sample comes first depends on how many
samples the run will draw: extending a run would change the data it has already seen. Here only the index building is
replaced (`EpochDataset`); reading stays Megatron's. For a stream of T tokens an epoch and samples of S:

    documents   epoch e is a permutation of the documents drawn from (seed, e); the epochs follow one another
    samples     number i starts at token i * S of that endless stream (no token is lost between epochs)
    shuffle     the samples that end within epoch e, (e*T - 1) // S <= i < ((e+1)*T - 1) // S, are permuted among
                themselves, drawn from (seed, e) as well

All three are functions of (seed, e) alone: a longer run has the same samples and then more. A blend takes the next
sample of the source that is furthest behind its weight (Megatron's BlendedDataset), which does not look ahead either.

The index of a source is written once into `cache_dir` by one process per node and then mapped by all: int32 [documents
of all epochs], int32 [samples + 1, 2], uint32 [samples]. It appears there by one rename. That of a blend, 10 bytes per
sample, is recomputed in memory by each process, in about 0.03 s per million samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from dqt_dist.data.indexed import check_ids, check_indexed, check_tokenizer, quiet_megatron_import
from dqt_dist.data.tokenizer import Tokenizer
from dqt_dist.errors import UserError, naming

with quiet_megatron_import():
    from megatron.core.datasets import helpers
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

# It warns that the blend's index is not cached, which is what we want (see above).
logging.getLogger("megatron.core.datasets.blended_dataset").setLevel(logging.ERROR)

ORDER_VERSION = 1  # raise it when the same arguments would give another order
# Validation is the same set for every seed of training, and so is the choice of held-out documents.
VALIDATION_SEED = 0
SPLIT_SEED = 1

Blend = Sequence[tuple[str, float]]


class Datasets(NamedTuple):
    """The samples of a run. An item is a dict with `tokens` and `labels` int64 [sequence_length], `loss_mask` float32
    [sequence_length] and, with document masking, `document_starts` int32 [documents]: the positions at which documents
    begin, ascending from 0. It is as long as the most documents that a sample of its dataset holds; the rest of it is
    sequence_length."""

    train: torch.utils.data.Dataset
    valid: torch.utils.data.Dataset | None
    valid_texts: dict[str, torch.utils.data.Dataset]


def build_datasets(
    *,
    train: Blend,
    valid: Blend | None,
    valid_fraction: float,
    valid_texts: Mapping[str, Blend] | None = None,
    sequence_length: int,
    vocab_size: int,
    tokenizer_path: str | Path | None,
    document_masking: bool = False,
    seed: int,
    num_train_samples: int,
    num_valid_samples: int,
    cache_dir: str | Path,
    build_here: bool,
    barrier: Callable[[], None],
) -> Datasets:
    """Exactly `num_train_samples` samples of training, and `num_valid_samples` of each validation.

    To be called by every process; `barrier` must hold them all until the slowest has come.

    train, valid: (path prefix, weight > 0) of each source. valid None: the fraction `valid_fraction` of each training
    source's documents is held out for validation (0: no validation, and `valid` of the result is None, as it is for
    num_valid_samples 0). valid_texts: further texts to validate on, by name. Validation is the same whatever `seed` and
    layout; where a text has fewer samples than asked for, it starts again from its beginning. vocab_size: the model's.
    tokenizer_path: None skips the checks against it. build_here: True in one process a node, which writes the index
    into `cache_dir`.

    Raises UserError: missing, truncated or mismatched files (indexed.check_indexed), ids outside of the model's
    vocabulary (indexed.check_ids), a source too small for one sample.
    """
    tokenizer = None if tokenizer_path is None else check_tokenizer(tokenizer_path, vocab_size)
    held_out = valid_fraction if valid is None else 0.0
    config = _megatron_config(
        sequence_length, vocab_size, tokenizer, document_masking, seed, Path(cache_dir), build_here
    )
    open_blend = functools.partial(_open_blend, held_out=held_out, vocab_size=vocab_size, tokenizer=tokenizer)
    # Every process checks all files before any waits for another, so that all of them stop for the same reason.
    training = open_blend("data.train", train, split=Split.train, num_samples=num_train_samples, config=config)
    fixed = dataclasses.replace(config, random_seed=VALIDATION_SEED)
    open_fixed = functools.partial(open_blend, split=Split.valid, num_samples=num_valid_samples, config=fixed)
    opened, validation, texts = {"data.train": train}, None, {}
    if num_valid_samples:
        if valid is not None:
            opened["data.valid"] = valid
            validation = open_fixed("data.valid", valid)
        elif held_out:
            validation = open_fixed("data.train", train)
        for name, blend in (valid_texts or {}).items():
            opened[f"data.valid_texts.{name}"] = blend
            # Nothing is held out of a text of its own.
            texts[name] = open_fixed(f"data.valid_texts.{name}", blend, held_out=0.0)

    def build() -> Datasets:
        built = {name: build_text() for name, build_text in texts.items()}
        return Datasets(training(), None if validation is None else validation(), built)

    def check_all_ids() -> None:
        for field, blend in opened.items():
            for index, (prefix, _) in enumerate(blend):
                where = f"{field}[{index}].path"
                check_ids(prefix, where=where, vocab_size=vocab_size, cache_folder=Path(cache_dir))

    # One process a node reads the tokens; the others find what it found, so that all of them raise the same.
    if build_here:
        with contextlib.suppress(UserError):
            check_all_ids()
    datasets = build() if build_here else None
    barrier()
    check_all_ids()
    return build() if datasets is None else datasets


def _open_blend(
    field: str,
    blend: Blend,
    *,
    split: Split,
    num_samples: int,
    held_out: float,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    config: EpochDatasetConfig,
) -> Callable[[], torch.utils.data.Dataset]:
    """Check the files of one split and return the function that builds its dataset: its only source, or a weighted
    blend."""
    for index, (_, weight) in enumerate(blend):
        if not 0 < weight < math.inf:
            raise UserError(
                f"{field}[{index}].weight: is {weight}, must be a number above 0; leave the source out instead"
            )
    # Relative to the largest: the sum of huge weights is no float.
    largest = max(weight for _, weight in blend)
    total = sum(weight / largest for _, weight in blend)
    weights = [weight / largest / total for _, weight in blend]
    # A blend never takes more than weight * n + 1 of a source: it takes from one that is behind its weight.
    counts = [num_samples] if len(blend) == 1 else [math.ceil(w * num_samples) + 1 for w in weights]
    sources = []
    for index, ((prefix, _), count) in enumerate(zip(blend, counts, strict=True)):
        where = f"{field}[{index}].path"
        check_indexed(prefix, where=where, vocab_size=vocab_size, tokenizer=tokenizer)
        indexed = IndexedDataset(prefix)
        documents = split_documents(len(indexed), held_out, split)
        tokens = _require_one_sample(where, prefix, indexed, documents, held_out, split, config.sequence_length)
        _require_memory_for_index(where, split, count, tokens, len(documents), config.sequence_length)
        sources.append(functools.partial(EpochDataset, indexed, prefix, documents, count, split, config))

    def build() -> torch.utils.data.Dataset:
        built = [source() for source in sources]
        most_documents = max(source.most_documents for source in built)
        for source in built:  # samples of all sources are stacked
            source.most_documents = most_documents
        return built[0] if len(built) == 1 else BlendedDataset(built, weights, num_samples, config)

    return build


def _require_one_sample(
    where: str,
    prefix: str,
    indexed: IndexedDataset,
    documents: np.ndarray,
    held_out: float,
    split: Split,
    sequence_length: int,
) -> int:
    """The tokens of `documents`."""
    tokens = int(indexed.sequence_lengths[documents].sum(dtype=np.int64))
    if tokens < sequence_length + 1:
        part = f" in its {split.name} part (data.valid_fraction {held_out})" if held_out else ""
        raise UserError(
            f"{where}: {prefix} has {tokens} tokens{part}, but one sample takes model.seq_length + 1 ="
            f" {sequence_length + 1}; prepare more text or lower model.seq_length"
        )
    return tokens


def _require_memory_for_index(
    where: str, split: Split, num_samples: int, tokens: int, documents: int, sequence_length: int
) -> None:
    """An index is made in memory, and has a few numbers for each sample and each document of each epoch."""
    epochs = num_samples * sequence_length // tokens + 1
    needed = 12 * num_samples + 4 * documents * epochs
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        field = "training.steps" if split is Split.train else "training.eval_batches"
        raise UserError(
            f"{field}: {num_samples} samples of {where} ({field} * training.global_batch_size) are {epochs} epochs of"
            f" it, whose index takes {needed / 2**30:,.0f} GiB; this machine has {memory / 2**30:,.0f} GiB; use fewer"
        )


def _megatron_config(
    sequence_length: int,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    document_masking: bool,
    seed: int,
    cache_dir: Path,
    build_here: bool,
) -> EpochDatasetConfig:
    eod = None if tokenizer is None else tokenizer.eod_id
    # What Megatron's datasets ask of a tokenizer. It has no `pad`: nothing is padded.
    wanted_of_tokenizer = SimpleNamespace(vocab_size=vocab_size, eod=eod, eos=eod, unique_identifiers={})
    return EpochDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        tokenizer=wanted_of_tokenizer,  # type: ignore[arg-type]
        # The blend and the split are made here; without these two Megatron would take itself to be mocked.
        blend=([], None),
        split="1",
        # These three look for the mark's id; `document_masking` is ours.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        document_masking=document_masking,
        cache_dir=cache_dir,
        build_here=build_here,
    )


def split_documents(num_documents: int, held_out: float, split: Split) -> np.ndarray:
    """Document numbers, int32, ascending, of the train or valid part when the fraction `held_out` is kept for
    validation.

    Held-out documents are drawn evenly from the whole file, the same ones for every seed of training."""
    order = np.random.RandomState(SPLIT_SEED).permutation(num_documents) if held_out else np.arange(num_documents)
    # At least one, as long as one is left for training.
    num_valid = min(max(1, round(held_out * num_documents)), num_documents - 1) if held_out else 0
    chosen = order[:num_valid] if held_out and split is Split.valid else order[num_valid:]
    return np.sort(chosen).astype(np.int32)


@dataclass
class EpochDatasetConfig(GPTDatasetConfig):
    """Megatron's configuration, document masking, and where our index lies (`path_to_cache` stays None: Megatron's own
    cache is not used)."""

    document_masking: bool = False
    cache_dir: Path = Path()
    build_here: bool = True


class EpochDataset(GPTDataset):
    """Megatron's GPTDataset with the order of the module docstring. Its length is exactly `num_samples`."""

    config: EpochDatasetConfig
    dataset: IndexedDataset
    dataset_path: str
    num_samples: int
    most_documents: int = 0
    """Length of `document_starts`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.config.document_masking:
            # Of every sample that the index has, so that the length is the same on all ranks.
            self.most_documents = int(np.diff(self.sample_index[:, 0]).max()) + 1

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(idx)
        if self.config.document_masking:
            sample["document_starts"] = self._document_starts(idx, sample["tokens"].numpy())
        return sample

    def _document_starts(self, idx: int, tokens: np.ndarray) -> torch.Tensor:
        number = int(self.shuffle_index[idx])
        (first, offset), (last, _) = self.sample_index[number], self.sample_index[number + 1]
        lengths = self.dataset.sequence_lengths[self.document_index[first:last]]
        later = np.cumsum(lengths, dtype=np.int64) - offset  # where all documents but the first begin
        before, tokenizer = later - 1, cast(Any, self.config.tokenizer)
        later -= (before >= 0) & (tokens[before] == tokenizer.eod)
        starts = np.full(self.most_documents, self.config.sequence_length, dtype=np.int32)
        starts[0], starts[1 : 1 + len(later)] = 0, later
        return torch.from_numpy(starts)

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens_per_epoch = self._get_num_tokens_per_epoch()
        num_epochs = -(-(self.num_samples * self.config.sequence_length + 1) // tokens_per_epoch)
        folder = self.config.cache_dir / f"{self.index_split.name}-{self._cache_key(num_epochs)}"
        if not folder.is_dir():
            if not self.config.build_here:
                raise UserError(
                    f"{folder}: the index of {self.dataset_path} is not there, although one process of this node has"
                    " written it; the cache folder must be the same for all processes of a node"
                )
            arrays = build_epoch_indices(
                self.dataset.sequence_lengths,
                self.indices,
                num_epochs,
                self.config.sequence_length,
                self.config.random_seed,
            )
            _save_at_once(folder, dict(zip(_INDEX_NAMES, arrays, strict=True)))
        document_index, sample_index, shuffle_index = (
            np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in _INDEX_NAMES
        )
        return document_index, sample_index, shuffle_index

    def _cache_key(self, num_epochs: int) -> str:
        """Everything the index depends on. A file prepared again at the same place has another size or time."""
        stat = os.stat(f"{self.dataset_path}.idx")
        described = [
            ORDER_VERSION,
            os.path.abspath(self.dataset_path),
            stat.st_size,
            stat.st_mtime_ns,
            hashlib.sha256(self.indices.tobytes()).hexdigest(),
            num_epochs,
            self.config.sequence_length,
            self.config.random_seed,
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


_INDEX_NAMES = ("document_index", "sample_index", "shuffle_index")


def build_epoch_indices(
    sequence_lengths: np.ndarray, documents: np.ndarray, num_epochs: int, sequence_length: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three index arrays of GPTDataset in the order of the module docstring.

    sequence_lengths: int32 [documents in the file], tokens of each. documents: int32, those to use.
    Returns document_index int32 [num_epochs * len(documents)]; sample_index int32 or int64 [samples + 1, 2], for each
    sample the position in document_index and the token offset at which it starts; shuffle_index uint32 or int64
    [samples].
    """
    tokens_per_epoch = int(sequence_lengths[documents].sum(dtype=np.int64))
    # Sample i is complete once the stream is i * S + S + 1 tokens long.
    complete = [max(0, (epoch * tokens_per_epoch - 1) // sequence_length) for epoch in range(num_epochs + 1)]
    index_type = np.uint32 if complete[-1] < 2**32 else np.int64
    document_epochs, shuffle_epochs = [], []
    for epoch in range(num_epochs):
        # RandomState's stream is frozen by numpy; it takes the seed in words of 32 bits.
        generator = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, epoch])
        document_epochs.append(generator.permutation(documents).astype(np.int32))
        shuffle_epochs.append(complete[epoch] + generator.permutation(complete[epoch + 1] - complete[epoch]))
    document_index = np.concatenate(document_epochs)
    sample_index = helpers.build_sample_idx(
        np.array(sequence_lengths), document_index, sequence_length, num_epochs, tokens_per_epoch
    )
    return document_index, sample_index, np.concatenate(shuffle_epochs).astype(index_type)


def _save_at_once(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write each array as a .npy file and let all of them appear in `folder` by one rename."""
    with naming(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        try:
            for name, array in arrays.items():
                np.save(scratch / f"{name}.npy", array)
            scratch.chmod(0o755)  # mkdtemp's 0700 would shut out other users of a shared cache
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # else a process of another node has put the same there
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
