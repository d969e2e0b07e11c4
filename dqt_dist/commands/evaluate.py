"""Loss, perplexity and bits per byte of a model on a text, from a checkpoint or an exported folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from dqt_dist.command_line import make_parser, positive, run_tool

EXAMPLES = """\
examples:
  # the newest checkpoint of a run, whatever its layout was, on a text
  %(prog)s --checkpoint runs/1b_ternary --data book.txt

  # on prepared data (the prefix of a .bin/.idx pair), the first 100,000 tokens, as JSON
  %(prog)s --checkpoint runs/1b_ternary --data data/demo/valid --max-tokens 100000 --json

  # an exported model with the arithmetic of its engine; every prediction from at least 1537 tokens
  %(prog)s --checkpoint export/1b --data book.txt --window 2048 --stride 512

what is scored:
  Documents follow one another, each after an end-of-document mark, as in training; every token after the first mark is
  predicted once. The model reads a window of tokens at a time. With --stride equal to the window (the default) windows
  do not overlap and the figures are those of lm-eval's rolling log-likelihood; a smaller stride scores only the last
  STRIDE tokens of each window, so that none is predicted from little: slower, and a lower loss where the model uses its
  context. loss is in nats per token; bits per byte divides by the bytes of the text in UTF-8 and compares across
  tokenizers.

Wrong input ends with one message and exit code 2.
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("dqt-evaluate", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="PATH", help="a run, a checkpoint, or an exported folder")
    add(
        "--data", required=True, metavar="FILE", help=".txt, .jsonl or .parquet (also .gz, .zst), or a .bin/.idx prefix"
    )
    add("--text-key", default="text", metavar="KEY", help="field of .jsonl and .parquet (default: text)")
    add("--window", type=positive, metavar="N", help="tokens that are read at once (default: the model's context)")
    add("--stride", type=positive, metavar="N", help="tokens from window to window (default: the window)")
    add("--max-tokens", type=positive, metavar="N", help="score the first N tokens only")
    add("--batch-size", type=positive, default=4, metavar="N", help="windows of one forward pass (default: 4)")
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="SentencePiece .model or tokenizer.json (default: that of the run or export)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the products (default: fp32)")
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    # Imports torch and transformers: not before the arguments are known to be good.
    from dqt_dist.inference.evaluate import evaluate, read_stream
    from dqt_dist.inference.language_model import open_model

    model = open_model(args.checkpoint, args.tokenizer, args.device, args.dtype)
    stream = read_stream(args.data, model.tokenizer, model.vocab_size, args.text_key, args.max_tokens)
    figures = evaluate(model, stream, args.window, args.stride, args.batch_size)
    if args.json:
        print(json.dumps({"model": model.description, "data": args.data, **dataclasses.asdict(figures)}))
        return
    print(f"model           {model.description}")
    print(f"data            {args.data}: {figures.tokens:,} tokens scored, {figures.text_bytes:,} bytes of text")
    print(f"window, stride  {figures.window}, {figures.stride} tokens")
    print(f"loss            {figures.loss:.4f} nats per token")
    print(f"perplexity      {figures.perplexity:.3f}")
    print(f"bits per byte   {figures.bits_per_byte:.4f}")


def main(argv: list[str] | None = None) -> int:
    return run_tool("dqt-evaluate", run, parse_arguments(argv))
