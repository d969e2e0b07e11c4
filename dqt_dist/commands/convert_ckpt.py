"""Turn a checkpoint into a model that other programs open, or such a model into a checkpoint."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dqt_dist.command_line import make_parser, run_tool
from dqt_dist.errors import RunError
from dqt_dist.export.errors import VerificationError

EXAMPLES = """\
formats:
  hf-bitnet      transformers; ternary codes at 2 bits                          default for ternary
  hf-compressed  transformers, vLLM; n-bit codes (compressed-tensors)           default for 2 to 8 bits
  hf             whatever reads a LLaMA; weights as floats                      default for method none
  gguf           llama.cpp and what is built on it; ternary or n-bit codes

examples:
  # the newest checkpoint of a run, whatever its layout was
  %(prog)s --checkpoint runs/1b_ternary --output export/1b

  # for llama.cpp
  %(prog)s --checkpoint runs/1b_ternary --output export/1b-gguf --format gguf

  # the finer integers behind the ternary codes, as plain weights
  %(prog)s --checkpoint runs/1b_ternary --output export/1b-latents --weights latent

  # ternary inference of an 8-bit model
  %(prog)s --checkpoint runs/1b_int8 --output export/1b-ternary --bits ternary

  # a checkpoint from one of these exports, or from a published LLaMA, to train on with --resume auto
  %(prog)s --from-hf export/1b --output runs/again
  %(prog)s --from-hf Llama-3.2-1B --config configs/1b_ternary.json --output runs/from_llama

The result is loaded and compared with the trainer's own model on text before it gets its name (--no-verify leaves this
out: the comparison holds both models in fp32 memory, the conversion itself one matrix). Wrong input ends with one
message and exit code 2, a result that is not the trained model with exit code 1; neither leaves a folder behind.
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("dqt-convert", __doc__, EXAMPLES)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="a run, its newest checkpoint, or one checkpoint"
    )
    source.add_argument("--from-hf", type=Path, metavar="DIR", help="a Hugging Face folder: plain LLaMA, or an export")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make; with --from-hf a run folder")
    add("--format", choices=("hf-bitnet", "hf-compressed", "hf", "gguf"), help="see below")
    add(
        "--gguf-type",
        metavar="TYPE",
        help="TQ2_0, TQ1_0, Q2_0, Q4_0, Q5_0, Q6_K, Q8_0; default: the smallest that fits",
    )
    add("--dtype", choices=("bf16", "fp32"), help="of embedding, head and norms; default: what the run computed in")
    add("--bits", choices=("ternary",), help="round the codes of an n-bit model to ternary ones")
    add(
        "--weights",
        choices=("codes", "latent"),
        default="codes",
        help="of a run with quantization.latent_bits: its codes, which it was trained to compute with, or its latents "
        "as floats (format hf)",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="SentencePiece .model or tokenizer.json; default: data.tokenizer of the run",
    )
    add("--config", type=Path, metavar="FILE", help="with --from-hf: the run; an export brings its own")
    add("--verify", action=argparse.BooleanOptionalAction, default=True, help="compare with the trainer's model")
    args = parser.parse_args(argv)
    if args.config and not args.from_hf:
        parser.error("--config goes with --from-hf; a checkpoint has its configuration")
    for_export = {"--format": args.format, "--bits": args.bits, "--dtype": args.dtype, "--gguf-type": args.gguf_type}
    for_export["--weights"] = args.weights != "codes"
    wrong = [name for name, value in for_export.items() if value and args.from_hf]
    if wrong:
        parser.error(f"{wrong[0]} does not go with --from-hf")
    return args


def run(args: argparse.Namespace) -> None:
    # Imports torch and Megatron: not before the arguments are known to be good.
    if args.from_hf:
        from dqt_dist.export.import_hf import import_hf

        import_hf(args.from_hf, args.output, args.config, args.tokenizer)
        return
    from dqt_dist.export.convert import Request, convert

    request = Request(
        args.checkpoint,
        args.output,
        format=args.format,
        dtype=args.dtype,
        ternary=args.bits == "ternary",
        of_latents=args.weights == "latent",
        verify=args.verify,
        tokenizer=args.tokenizer,
        gguf_type=args.gguf_type,
    )
    try:
        convert(request)
    except VerificationError as error:
        raise RunError(f"verification failed, nothing was written\n{error}") from error


def main(argv: list[str] | None = None) -> int:
    if argv is None:  # this process does nothing else
        # The comparison is defined in fp32 on the CPU; a GPU, which may be training, stays out of it.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    interrupted = "interrupted; nothing was left behind"
    return run_tool("dqt-convert", run, parse_arguments(argv), interrupted)
