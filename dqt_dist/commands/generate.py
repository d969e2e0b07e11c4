"""Continue a text with a model, from a checkpoint or an exported folder; tokens are printed as they come."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from dqt_dist.command_line import make_parser, run_tool

EXAMPLES = """\
examples:
  # the newest checkpoint of a run, whatever its layout was
  %(prog)s --checkpoint runs/1b_ternary --prompt "A list is"

  # the best token always, from an exported folder
  %(prog)s --checkpoint export/1b --prompt "A list is" --temperature 0 --max-tokens 64

  # other draws
  %(prog)s --checkpoint runs/1b_ternary --prompt "A list is" --temperature 0.7 --top-p 0.9 --top-k 50 --seed 1

Prompt and continuation go to standard output, everything else to standard error. The text ends after --max-tokens, with
the model's context, or where the model ends the document. An empty prompt begins a new document. The same seed gives
the same text on the same kind of device. Wrong input ends with one message and exit code 2.
"""


def number(kind: type, least: float, most: float = sys.float_info.max, above: bool = False):
    """A parser of numbers in [least, most], or (least, most] with `above`, for argparse."""

    def parse(word: str):
        value = kind(word)
        if not (least < value if above else least <= value) or not value <= most:
            bounds = f"{'above' if above else 'at least'} {least:g}, at most {most:g}"
            raise argparse.ArgumentTypeError(f"{word} is out of range: {bounds}")
        return value

    parse.__name__ = "number"  # what argparse calls it for a word that is none
    return parse


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("dqt-generate", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="PATH", help="a run, a checkpoint, or an exported folder")
    add("--prompt", required=True, metavar="TEXT", help="text to continue")
    add("--max-tokens", type=number(int, 1), default=128, metavar="N", help="of the continuation (default: 128)")
    add("--temperature", type=number(float, 0), default=0.8, metavar="T", help="0: the best token (default: 0.8)")
    add("--top-p", type=number(float, 0, 1, above=True), default=0.95, metavar="P", help="nucleus (default: 0.95)")
    add("--top-k", type=number(int, 1), metavar="K", help="draw from the K best tokens (default: from all)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the draws (default: 0)")
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="SentencePiece .model or tokenizer.json (default: that of the run or export)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the products (default: fp32)")
    return parser.parse_args(argv)


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def run(args: argparse.Namespace) -> None:
    # Imports torch and transformers: not before the arguments are known to be good.
    from dqt_dist.inference.generate import Sampling, encode_prompt, generate
    from dqt_dist.inference.language_model import open_model

    model = open_model(args.checkpoint, args.tokenizer, args.device, args.dtype)
    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.seed, args.max_tokens)
    encode_prompt(model, args.prompt)  # speaks up before the first line
    print(model.description, file=sys.stderr, flush=True)
    begin = time.perf_counter()
    try:
        tokens = generate(model, args.prompt, sampling, show)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the message begins its own line
        raise
    seconds = time.perf_counter() - begin
    show("\n")
    ended = " (end of the document)" if tokens[-1] == model.tokenizer.eod_id else ""
    print(f"{len(tokens)} tokens{ended}, {len(tokens) / seconds:.1f} tokens/s", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    return run_tool("dqt-generate", run, args)
