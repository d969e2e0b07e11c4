#!/usr/bin/env python3
"""Turn text into the token files that training reads.

Reads documents (dqt_dist/data/ingest.py), trains a SentencePiece tokenizer on them or takes one (tokenizer.py),
tokenises in parallel processes and writes Megatron's indexed format with a manifest (indexed.py). In the output folder:

    tokenizer.model                       the tokenizer, trained or copied
    train.bin  train.idx  train.json      tokens, index, manifest of the training documents
    valid.bin  valid.idx  valid.json      the same of the validation documents

All files are made in a scratch folder inside the output folder and renamed at the end, manifests last: an interrupted
run leaves what was there before. The same inputs give the same bytes, whatever --workers is.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from dqt_dist.command_line import make_parser, run_tool
from dqt_dist.errors import UserError

if TYPE_CHECKING:  # the functions import what they need when they run, so that --help is quick
    from dqt_dist.data.indexed import EncodedBatch
    from dqt_dist.data.ingest import Source

DESCRIPTION = "Turn text into the token files that training reads: trains or takes a tokenizer, then tokenises."
PREPARE_VERSION = 1  # raise it when the same inputs and options would give other files
SCRATCH = ".prepare_data.partial"

EXAMPLES = """\
examples:
  # real text without a network: the documentation of Python's own standard library
  tools/prepare_data.py --input python-docs --vocab-size 2048 --output data/demo

  # your own files; quote the patterns
  tools/prepare_data.py --input 'corpus/train-*.jsonl.zst' --valid-input corpus/valid.jsonl.zst \\
      --vocab-size 32000 --output data/corpus

  # a second corpus with the same tokenizer, to blend with the first
  tools/prepare_data.py --input book1.txt book2.txt.gz --tokenizer data/corpus/tokenizer.model \\
      --name books --output data/corpus

Then set in the configuration: data.train = [{"path": "data/corpus/train", "weight": 1.0}],
data.valid = [{"path": "data/corpus/valid", "weight": 1.0}], data.tokenizer = "data/corpus/tokenizer.model".

A .jsonl line or .parquet row is one document; a .txt file is cut at empty lines into documents of at least 8,192
characters, or is one document when it is shorter.
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--input", nargs="+", metavar="FILE", help=".txt, .jsonl, .parquet, also .gz or .zst; or the word python-docs"
    )
    what.add_argument("--hf-dataset", metavar="NAME", help="a Hugging Face dataset, read as a stream")
    add("--hf-config", metavar="NAME", help="its configuration, where it has several")
    add("--hf-split", metavar="NAME", default="train", help="its split (default: train)")
    add("--text-key", metavar="KEY", default="text", help="field that holds the text (default: text)")
    add("--output", metavar="FOLDER", type=Path, required=True, help="folder of the files; made when missing")
    add(
        "--name",
        default="train",
        help="name of the training files (default: train); another NAME gives NAME_valid for validation",
    )
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--vocab-size", type=int, metavar="N", help="train a tokenizer of N pieces on this text")
    tokenizer.add_argument("--tokenizer", type=Path, metavar="MODEL", help="take this SentencePiece .model file")
    valid = parser.add_mutually_exclusive_group()
    valid.add_argument(
        "--valid-fraction", type=float, default=0.02, metavar="F",
        help="hold out this part of the documents, chosen by a hash of their text (default: 0.02); 0 for none",
    )  # fmt: skip
    valid.add_argument("--valid-input", nargs="+", metavar="FILE", help="files of the validation documents, instead")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="tokenising processes (default: all cores)")
    add("--force", action="store_true", help="prepare again even when the files are up to date")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: must be at least 1")
    if args.vocab_size is not None and args.vocab_size < 1:
        parser.error(f"--vocab-size {args.vocab_size}: must be at least 1")
    if not 0 <= args.valid_fraction < 1:
        parser.error(f"--valid-fraction {args.valid_fraction}: must be at least 0 and below 1")
    if not args.name or args.name != Path(args.name).name or args.name == "tokenizer":
        parser.error(f"--name {args.name}: must be a plain file name other than tokenizer")
    return args


def prepare(args: argparse.Namespace) -> None:
    """The whole run: see whether anything is to do, tokenizer, tokens, renames, report."""
    from dqt_dist.data.ingest import HubDataset, Source, local_source

    start = time.perf_counter()
    source = (
        local_source(args.input, args.text_key)
        if args.input
        else Source(hub=HubDataset(args.hf_dataset, args.hf_config, args.hf_split), text_key=args.text_key)
    )
    valid_source = local_source(args.valid_input, args.text_key) if args.valid_input else None
    valid_name = "valid" if args.name == "train" else f"{args.name}_valid"
    names = [args.name, valid_name] if valid_source or args.valid_fraction else [args.name]
    request = request_hash(args, source, valid_source)
    if not args.force and up_to_date(args.output, names, request):
        print(f"{args.output}: {', '.join(names)} and tokenizer.model are up to date (--force prepares them again)")
        return

    scratch = args.output / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)  # what an interrupted run left
    scratch.mkdir(parents=True)
    try:
        count = make_tokenizer(args, source, scratch)
        refuse_other_tokenizer(args.output, names, scratch)
        write_tokens(args, source, valid_source, names, request, count, scratch)
        install(scratch, args.output, names)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report(args.output, names, time.perf_counter() - start)


def request_hash(args: argparse.Namespace, source: Source, valid_source: Source | None) -> str:
    """Identifies inputs and options; equal when running again would write the same files."""
    tokenizer = args.vocab_size
    if args.tokenizer is not None:
        from dqt_dist.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer).sha256
    held_out = valid_source.identity() if valid_source else args.valid_fraction
    described = json.dumps([PREPARE_VERSION, source.identity(), tokenizer, held_out])
    return hashlib.sha256(described.encode()).hexdigest()


def up_to_date(output: Path, names: list[str], request: str) -> bool:
    """Whether every file of this request is there in the size its manifest says, with its tokenizer."""
    from dqt_dist.data.indexed import Manifest

    def size(path: Path) -> int:
        return path.stat().st_size if path.is_file() else -1

    model = output / "tokenizer.model"
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest() if model.is_file() else None
    for name in names:
        try:
            manifest = Manifest.read(output / f"{name}.json")
        except UserError:
            return False  # it will be replaced
        if manifest is None or manifest.request != request or manifest.tokenizer_sha256 != sha256:
            return False
        if (size(output / f"{name}.bin"), size(output / f"{name}.idx")) != (manifest.bin_bytes, manifest.idx_bytes):
            return False
    return True


def progress(documents: Iterable[str], what: str, total: int | None = None) -> Iterator[str]:
    """The same documents, under a progress bar on stderr (a line every 10 s where that is a file)."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 10.0
    yield from tqdm(
        documents, what, total, unit=" documents", unit_scale=True, mininterval=interval, maxinterval=interval
    )


def make_tokenizer(args: argparse.Namespace, source: Source, scratch: Path) -> int | None:
    """Put tokenizer.model into the scratch folder: a copy of the given one, or trained on the documents that are not
    held out.

    Returns the number of documents of `source`, or None when they were not read.
    """
    from dqt_dist.data.indexed import belongs_to_valid
    from dqt_dist.data.ingest import read_documents
    from dqt_dist.data.tokenizer import HashSample, train_tokenizer

    if args.tokenizer is not None:
        shutil.copyfile(args.tokenizer, scratch / "tokenizer.model")
        return None
    held_out_fraction = 0.0 if args.valid_input else args.valid_fraction
    sample, count = HashSample(), 0
    for text in progress(read_documents(source), "reading"):
        count += 1
        if not belongs_to_valid(text, held_out_fraction):
            sample.add(text)
    if count == 0:
        raise UserError("the input holds no document with text in it")
    chosen = sample.documents()
    print(f"training a tokenizer of {args.vocab_size} pieces on {len(chosen)} of {count} documents", file=sys.stderr)
    (scratch / "tokenizer.model").write_bytes(train_tokenizer(chosen, args.vocab_size))
    return count


def refuse_other_tokenizer(output: Path, names: list[str], scratch: Path) -> None:
    """One folder holds one tokenizer.model: raise UserError when files that stay were prepared with another."""
    from dqt_dist.data.indexed import Manifest

    sha256 = hashlib.sha256((scratch / "tokenizer.model").read_bytes()).hexdigest()
    for path in sorted(output.glob("*.json")):
        with contextlib.suppress(UserError):  # some other .json file
            manifest = Manifest.read(path) if path.stem not in names else None
            if manifest is not None and manifest.tokenizer_sha256 != sha256:
                break
    else:
        return
    raise UserError(
        f"--output {output}: {path} was prepared with the tokenizer that lies there, which this run would replace; give"
        f" --tokenizer {output / 'tokenizer.model'} to use the same one, another --output, or remove"
        f" {path.with_suffix('')}.*"
    )


def write_tokens(
    args: argparse.Namespace,
    source: Source,
    valid_source: Source | None,
    names: list[str],
    request: str,
    count: int | None,
    scratch: Path,
) -> None:
    """Tokenise into the scratch folder: names[0] gets the training documents, names[1], if any, those held out."""
    from dqt_dist.data.indexed import IndexedWriter, encode_documents
    from dqt_dist.data.ingest import read_documents
    from dqt_dist.data.tokenizer import load_tokenizer

    model = scratch / "tokenizer.model"
    tokenizer = load_tokenizer(model)

    def tokenise(source: Source, what: str, count: int | None, held_out_fraction: float) -> Iterator[EncodedBatch]:
        documents = progress(read_documents(source), what, count)
        return encode_documents(documents, model, workers=args.workers, valid_fraction=held_out_fraction)

    with contextlib.ExitStack() as open_files:
        writers = [IndexedWriter(scratch / name, tokenizer, request) for name in names]
        for writer in writers:
            open_files.callback(writer.close)
        if valid_source is not None:
            for batch in tokenise(valid_source, "tokenizing validation", None, 0.0):
                writers[1].add_batch(batch)
        for batch in tokenise(source, "tokenizing", count, 0.0 if valid_source else args.valid_fraction):
            writers[0].add_batch(batch, only_valid=False)
            if valid_source is None and len(writers) == 2:
                writers[1].add_batch(batch, only_valid=True)
        for writer in writers:
            if writer.documents == 0:
                refuse_empty(args, writer is writers[0], sum(w.documents for w in writers))
            writer.finish()


def refuse_empty(args: argparse.Namespace, is_train: bool, documents: int) -> None:
    """Raise the UserError for a split that got no document."""
    if args.valid_input or documents == 0:
        raise UserError(f"the {'input' if is_train else '--valid-input'} holds no document with text in it")
    split = "training" if is_train else "validation"
    raise UserError(
        f"--valid-fraction {args.valid_fraction}: of {documents} document(s) this leaves none for {split}; give another"
        " fraction (0 for no validation files), --valid-input, or more documents"
    )


def install(scratch: Path, output: Path, names: list[str]) -> None:
    """Rename the finished files into place. Manifests go last: until then an old one disagrees with the new files'
    sizes, which both this tool and training notice."""
    os.replace(scratch / "tokenizer.model", output / "tokenizer.model")
    for suffix in (".bin", ".idx", ".json"):
        for name in names:
            os.replace(scratch / f"{name}{suffix}", output / f"{name}{suffix}")


def report(output: Path, names: list[str], seconds: float) -> None:
    """Print what was made and how fast."""
    from dqt_dist.data.indexed import Manifest

    total_tokens = 0
    for name in names:
        manifest = Manifest.read(output / f"{name}.json")
        assert manifest is not None
        total_tokens += manifest.tokens
        per_byte, per_word = manifest.tokens / manifest.text_bytes, manifest.tokens / manifest.words
        print(
            f"{output / name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.dtype},"
            f" vocabulary {manifest.vocab_size:,}) from {manifest.text_bytes:,} bytes of text:"
            f" {per_byte:.3f} tokens a byte, {per_word:.2f} a word; .bin {manifest.bin_bytes:,} bytes"
        )
    rate = total_tokens / seconds
    print(f"{total_tokens:,} tokens in {seconds:.1f} s, {rate:,.0f} tokens/s, reading and tokenizer included")


def main(argv: list[str] | None = None) -> int:
    interrupted = "interrupted; run it again to start over"
    return run_tool("prepare_data", prepare, parse_arguments(argv), interrupted)


if __name__ == "__main__":
    sys.exit(main())
