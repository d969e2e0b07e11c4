"""Turn text into the token files that training reads.

Reads documents (dqt_dist/data/ingest.py), trains a SentencePiece tokenizer on them or takes one, a SentencePiece model
or a tokenizer.json of Hugging Face (tokenizer.py), tokenises in parallel processes and writes Megatron's indexed format
with a manifest (indexed.py). In the output folder:

    tokenizer.model  or  tokenizer.json   the tokenizer, trained or taken
    train.bin  train.idx  train.json      tokens, index, manifest of the training documents
    valid.bin  valid.idx  valid.json      the same of the validation documents

All files are made in scratch folders inside the output folder (`.NAME.partial`, one a name, each locked by the run that
uses it) and renamed at the end, manifests last: an interrupted run leaves what was there before, and runs of different
names may go on at once. Nothing that another preparation made is replaced without --force. The same inputs give the
same bytes, whatever --workers is, and under mpirun, where the first rank reads and writes and the others tokenise.

Every document is decoded again and compared: a tokenizer from which text does not come back is reported, and refused
above --max-loss.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING

from dqt_dist.command_line import as_typed, make_parser, run_tool
from dqt_dist.errors import UserError, naming
from dqt_dist.folder_lock import LOCK_FILE, FolderLock
from dqt_dist.launch import mpi, under_mpirun
from dqt_dist.progress_line import ProgressLine

if TYPE_CHECKING:  # the functions import what they need when they run, so that --help is quick
    from dqt_dist.data.indexed import EncodedBatch, IndexedWriter, Manifest, TextLoss
    from dqt_dist.data.ingest import Source
    from dqt_dist.data.tokenizer import Tokenizer

DESCRIPTION = "Turn text into the token files that training reads: trains or takes a tokenizer, then tokenises."
PREPARE_VERSION = 2  # raise it when the same inputs and options would give other files
# A tokenizer above --max-loss is refused after this much text, and not only at the end.
_CHARACTERS_TO_JUDGE_BY = 2**24

EXAMPLES = """\
examples:
  # real text without a network: the documentation of Python's own standard library
  %(prog)s --input python-docs --vocab-size 2048 --output data/demo

  # your own files; quote the patterns
  %(prog)s --input 'corpus/train-*.jsonl.zst' --valid-input corpus/valid.jsonl.zst \\
      --vocab-size 32000 --output data/corpus

  # a second corpus with the same tokenizer, to blend with the first
  %(prog)s --input book1.txt book2.txt.gz --tokenizer data/corpus/tokenizer.model \\
      --name books --output data/corpus

  # the same over several nodes: the first rank reads and writes, the other ranks tokenise; --output is on a shared disk
  mpirun -n 64 --hostfile HOSTFILE %(prog)s --input 'corpus/*.jsonl.zst' --vocab-size 32000 --output data/corpus

Then set in the configuration: data.train = [{"path": "data/corpus/train", "weight": 1.0}],
data.valid = [{"path": "data/corpus/valid", "weight": 1.0}], data.tokenizer = "data/corpus/tokenizer.model".

A .jsonl line or .parquet row is one document; a .txt file is cut after empty lines into documents of at least 8,192
characters, or is one document when it is shorter. Only the field of --text-key is looked at.
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("dqt-prepare-data", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--input",
        nargs="+",
        metavar="FILE",
        help=".txt, .jsonl, .json (one object per line), .parquet, also .gz or .zst; or the word python-docs",
    )
    what.add_argument("--hf-dataset", metavar="NAME", help="a Hugging Face dataset, read as a stream")
    add("--hf-config", metavar="NAME", help="its configuration, where it has several")
    add("--hf-split", metavar="NAME", default="train", help="its split (default: train)")
    add(
        "--text-key",
        metavar="KEY",
        default="text",
        help="field that holds the text, meta.text inside an object (default: text)",
    )
    add("--skip-bad-rows", action="store_true", help="leave out lines and rows that hold no text, and count them")
    add("--output", metavar="FOLDER", type=Path, required=True, help="folder of the files; made when missing")
    add(
        "--name",
        default="train",
        help="name of the training files (default: train); another NAME gives NAME_valid for validation",
    )
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--vocab-size", type=int, metavar="N", help="train a tokenizer of N pieces on this text")
    tokenizer.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="take this SentencePiece .model or Hugging Face tokenizer.json"
    )
    add(
        "--end-of-text",
        metavar="TOKEN",
        help="the special token of a tokenizer.json that ends a document (default: what it or the files beside it say)",
    )
    valid = parser.add_mutually_exclusive_group()
    valid.add_argument(
        "--valid-fraction", type=float, default=0.02, metavar="F",
        help="hold out this part of the documents, chosen by a hash of their text (default: 0.02); 0 for none",
    )  # fmt: skip
    valid.add_argument("--valid-input", nargs="+", metavar="FILE", help="files of the validation documents, instead")
    add(
        "--workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="tokenising processes (default: all cores; under mpirun all ranks but the first)",
    )
    add(
        "--max-loss", type=float, default=0.001, metavar="SHARE",
        help="refuse a tokenizer that loses a larger share of tokens (unknown), characters or newlines of the text"
        " (default: 0.001); 1 takes any",
    )  # fmt: skip
    add("--force", action="store_true", help="prepare again even when the files are up to date, and replace others'")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: must be at least 1")
    if args.vocab_size is not None and args.vocab_size < 1:
        parser.error(f"--vocab-size {args.vocab_size}: must be at least 1")
    if args.end_of_text is not None and args.tokenizer is None:
        parser.error(f"--end-of-text {args.end_of_text}: is of a tokenizer.json; a tokenizer trained here has </s>")
    if not 0 <= args.valid_fraction < 1:
        parser.error(f"--valid-fraction {args.valid_fraction}: must be at least 0 and below 1")
    if not 0 <= args.max_loss <= 1:
        parser.error(f"--max-loss {args.max_loss}: must be from 0 to 1")
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
        print(f"{args.output}: {', '.join(names)} and the tokenizer are up to date (--force prepares them again)")
        return

    with naming(args.output), contextlib.ExitStack() as held:
        scratch = {name: held.enter_context(scratch_folder(args.output, name)) for name in names}
        refuse_other_data(args, names, request)
        tokenizer, count = make_tokenizer(args, source, scratch[args.name])
        refuse_other_tokenizer(args, names, tokenizer)
        loss = write_tokens(args, tokenizer, source, valid_source, request, count, scratch)
        # Another name may have been prepared meanwhile: look again, and let nobody come between looking and doing.
        with FolderLock(args.output, as_typed("dqt-prepare-data"), wait=True):
            refuse_other_data(args, names, request)
            refuse_other_tokenizer(args, names, tokenizer)
            install(tokenizer, scratch, args.output)
    report(args.output, names, loss, time.perf_counter() - start)


@contextlib.contextmanager
def scratch_folder(output: Path, name: str) -> Iterator[Path]:
    """An empty folder for the files of `name`, which no other preparation of that name uses meanwhile."""
    folder = output / f".{name}.partial"

    def clear() -> None:
        for path in folder.iterdir():
            if path.name != LOCK_FILE:
                path.unlink()

    with contextlib.ExitStack() as cleared, FolderLock(folder, f"{as_typed('dqt-prepare-data')} --name {name}"):
        clear()  # what an interrupted run left
        cleared.callback(remove_if_empty, folder)
        try:
            yield folder
        finally:
            clear()


def remove_if_empty(folder: Path) -> None:
    """Remove a folder, unless another preparation is already in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def request_hash(args: argparse.Namespace, source: Source, valid_source: Source | None) -> str:
    """Identifies inputs and options; equal when running again would write the same files."""
    from dqt_dist.data.tokenizer import load_tokenizer

    tokenizer = args.vocab_size or load_tokenizer(args.tokenizer, args.end_of_text).sha256
    held_out = valid_source.identity() if valid_source else args.valid_fraction
    described = json.dumps([PREPARE_VERSION, source.identity(), tokenizer, held_out, args.skip_bad_rows])
    return hashlib.sha256(described.encode()).hexdigest()


def up_to_date(output: Path, names: list[str], request: str) -> bool:
    """Whether every file of this request is there in the size its manifest says, with its tokenizer."""

    def size(path: Path) -> int:
        return path.stat().st_size if path.is_file() else -1

    sha256 = sha256_of_tokenizer(output)
    for name in names:
        manifest = manifest_of(output / name)
        if manifest is None or manifest.request != request or manifest.tokenizer_sha256 != sha256:
            return False
        if (size(output / f"{name}.bin"), size(output / f"{name}.idx")) != (manifest.bin_bytes, manifest.idx_bytes):
            return False
    return True


def sha256_of_tokenizer(output: Path) -> str | None:
    """Of the tokenizer that a folder keeps, "" where that cannot be used; None where there is none."""
    from dqt_dist.data.tokenizer import kept_tokenizer, load_tokenizer

    kept = kept_tokenizer(output)
    if kept is None:
        return None
    with contextlib.suppress(UserError):
        return load_tokenizer(kept).sha256
    return ""


def progress(documents: Iterable[str], what: str, total: int | None = None) -> Generator[str]:
    """The same documents, under a line that counts them."""
    yield from ProgressLine(documents, what, total=total, unit=" documents", unit_scale=True)


class BadRows:
    """Left out and counted with --skip-bad-rows; otherwise the first one ends the run."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.count = 0

    def __call__(self, message: str) -> None:
        if not self.skip:
            raise UserError(f"{message}. --skip-bad-rows leaves such rows out")
        self.count += 1
        if self.count == 1:
            print(f"\nleft out, as are others like it: {message}", file=sys.stderr)


def make_tokenizer(args: argparse.Namespace, source: Source, folder: Path) -> tuple[Tokenizer, int | None]:
    """Write a tokenizer into `folder`: the given one, or one trained on the documents that are not held out.

    Returns it as it lies there, and the number of documents of `source`, or None when they were not read.
    """
    from dqt_dist.data.indexed import belongs_to_valid
    from dqt_dist.data.ingest import read_documents
    from dqt_dist.data.tokenizer import HashSample, SentencePieceTokenizer, load_tokenizer, train_tokenizer

    if args.tokenizer is not None:
        given = load_tokenizer(args.tokenizer, args.end_of_text)
        (folder / given.file_name).write_bytes(given.model)
        return load_tokenizer(folder / given.file_name), None
    held_out_fraction = 0.0 if args.valid_input else args.valid_fraction
    sample, count = HashSample(), 0
    for text in progress(read_documents(source, BadRows(args.skip_bad_rows)), "reading"):
        count += 1
        if not belongs_to_valid(text, held_out_fraction):
            sample.add(text)
    if count == 0:
        raise UserError("the input holds no document with text in it")
    chosen = sample.documents()
    print(f"training a tokenizer of {args.vocab_size} pieces on {len(chosen)} of {count} documents", file=sys.stderr)
    model = folder / SentencePieceTokenizer.file_name
    model.write_bytes(train_tokenizer(chosen, args.vocab_size))
    return load_tokenizer(model), count


def manifest_of(prefix: Path) -> Manifest | None:
    """The manifest of prepared files; None where there is none that can be understood."""
    from dqt_dist.data.indexed import Manifest

    with contextlib.suppress(UserError):
        return Manifest.read(prefix.with_name(f"{prefix.name}.json"))


def refuse_other_data(args: argparse.Namespace, names: list[str], request: str) -> None:
    """Raise UserError when files that would be replaced are not of this very preparation, unless --force is given."""
    for name in names if not args.force else ():
        there = [path for s in (".json", ".bin", ".idx") if (path := args.output / f"{name}{s}").exists()]
        manifest = manifest_of(args.output / name)
        if there and (manifest is None or manifest.request != request):
            raise UserError(
                f"--output {args.output}: {there[0].name} is of another preparation (other inputs, options or version"
                " of this tool) and would be replaced; give another --name or --output, or replace it with --force"
            )


def refuse_other_tokenizer(args: argparse.Namespace, names: list[str], tokenizer: Tokenizer) -> None:
    """One folder holds one tokenizer: raise UserError when this one would replace another, unless --force is given and
    no file that stays was prepared with the other."""
    from dqt_dist.data.tokenizer import kept_tokenizer

    there, sha256 = kept_tokenizer(args.output), tokenizer.sha256
    if there is None or sha256_of_tokenizer(args.output) == sha256:
        return
    for path in sorted(args.output.glob("*.json")):
        manifest = manifest_of(path.with_suffix("")) if path.stem not in names else None
        if manifest is not None and manifest.tokenizer_sha256 != sha256:
            raise UserError(
                f"--output {args.output}: {path} was prepared with the tokenizer that lies there, which this run would"
                f" replace; give --tokenizer {there} to use the same one, another --output, or remove"
                f" {path.with_suffix('')}.*"
            )
    if not args.force:
        raise UserError(
            f"--output {args.output}: another {there.name} lies there, which this run would replace; runs that were"
            f" trained with it need it. Give --tokenizer {there} to use the same one, another --output, or replace it"
            " with --force"
        )


def write_tokens(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    source: Source,
    valid_source: Source | None,
    request: str,
    count: int | None,
    scratch: dict[str, Path],
) -> TextLoss:
    """Tokenise into the scratch folders: the first name gets the training documents, the second, if any, those held
    out.

    Returns what the text lost in the tokenizer. Raises UserError when that is above --max-loss.
    """
    from dqt_dist.data.indexed import IndexedWriter, TextLoss, encode_documents
    from dqt_dist.data.ingest import read_documents

    loss = TextLoss()

    def tokenise(
        source: Source, what: str, count: int | None, held_out_fraction: float, writer: IndexedWriter
    ) -> Iterator[EncodedBatch]:
        """Count losses, and the bad rows for `writer`."""
        nonlocal loss
        bad_rows = BadRows(args.skip_bad_rows)
        with contextlib.closing(progress(read_documents(source, bad_rows), what, count)) as documents:
            for batch in encode_documents(
                documents, tokenizer.path, workers=args.workers, valid_fraction=held_out_fraction, pool=args.pool
            ):
                loss += batch.loss
                if loss.characters >= _CHARACTERS_TO_JUDGE_BY:
                    refuse_loss(args, loss)
                yield batch
        writer.skipped_rows = bad_rows.count

    with contextlib.ExitStack() as open_files:
        writers = [IndexedWriter(folder / name, tokenizer, request) for name, folder in scratch.items()]
        for writer in writers:
            open_files.callback(writer.close)
        if valid_source is not None:
            for batch in tokenise(valid_source, "tokenizing validation", None, 0.0, writers[1]):
                writers[1].add_batch(batch)
        fraction = 0.0 if valid_source else args.valid_fraction
        for batch in tokenise(source, "tokenizing", count, fraction, writers[0]):
            writers[0].add_batch(batch, only_valid=False)
            if valid_source is None and len(writers) == 2:
                writers[1].add_batch(batch, only_valid=True)
        for writer in writers:
            if writer.documents == 0:
                refuse_empty(args, writer is writers[0], sum(w.documents for w in writers), writer.skipped_rows)
        refuse_loss(args, loss)
        for writer in writers:
            writer.finish()
    return loss


def refuse_loss(args: argparse.Namespace, loss: TextLoss) -> None:
    """Raise the UserError for a tokenizer that loses more than --max-loss."""
    if loss.largest_share > args.max_loss:
        raise UserError(
            f"tokenizer {args.tokenizer or 'trained here'}: text does not come back from it: in {loss.documents:,}"
            f" documents {loss}."
            " Take a tokenizer with byte fallback and without normalization, or accept the loss with"
            f" --max-loss {math.ceil(1000 * loss.largest_share) / 1000}"
        )


def refuse_empty(args: argparse.Namespace, is_train: bool, documents: int, skipped_rows: int) -> None:
    """Raise the UserError for a split that got no document."""
    if args.valid_input or documents == 0:
        skipped = f" ({skipped_rows:,} bad rows were left out)" if skipped_rows else ""
        raise UserError(f"the {'input' if is_train else '--valid-input'} holds no document with text in it{skipped}")
    split = "training" if is_train else "validation"
    raise UserError(
        f"--valid-fraction {args.valid_fraction}: of {documents} document(s) this leaves none for {split}; give another"
        " fraction (0 for no validation files), --valid-input, or more documents"
    )


def install(tokenizer: Tokenizer, scratch: dict[str, Path], output: Path) -> None:
    """Rename the finished files into place. A tokenizer that is there already stays, as somebody else's tokenizer.json
    may be written in another way. Manifests go last: until then an old one disagrees with the new files'
    sizes, which both this tool and training notice."""
    from dqt_dist.data.tokenizer import drop_other_tokenizer

    if sha256_of_tokenizer(output) != tokenizer.sha256:
        os.replace(tokenizer.path, output / tokenizer.file_name)
        drop_other_tokenizer(output, tokenizer)
    for suffix in (".bin", ".idx", ".json"):
        for name, folder in scratch.items():
            os.replace(folder / f"{name}{suffix}", output / f"{name}{suffix}")


def report(output: Path, names: list[str], loss: TextLoss, seconds: float) -> None:
    """Print what was made, what was lost, and how fast."""
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
        if manifest.skipped_rows:
            print(f"{output / name}: {manifest.skipped_rows:,} bad rows were left out (--skip-bad-rows)")
    if loss.largest_share:
        print(f"lost in the tokenizer: {loss}")
    rate = total_tokens / seconds
    print(f"{total_tokens:,} tokens in {seconds:.1f} s, {rate:,.0f} tokens/s, reading and tokenizer included")


def main(argv: list[str] | None = None) -> int:
    if argv is None and under_mpirun():
        return run_under_mpirun()
    return run(parse_arguments(argv))


def run(args: argparse.Namespace, pool: Executor | None = None, workers: int | None = None) -> int:
    args.pool, args.workers = pool, workers or args.workers
    return run_tool("dqt-prepare-data", prepare, args, interrupted="interrupted; run it again to start over")


def run_under_mpirun() -> int:
    """The first rank runs the tool, and the other ranks, on whatever nodes, tokenise for it."""
    world = mpi().COMM_WORLD
    if world.size == 1:
        return run(parse_arguments(None))
    from mpi4py.futures import MPICommExecutor

    with MPICommExecutor(world, root=0) as pool:  # the other ranks work in here, and have no pool
        return 0 if pool is None else run(parse_arguments(None), pool, world.size - 1)
