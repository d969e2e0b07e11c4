"""From a checkpoint to a folder that other programs open: plan, write, verify, rename.

Weights(reader) -> entries of the format -> safetensors, config, tokenizer, model card -> verify -> output folder
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.checkpoint.run_tokenizer import check_tokenizer
from dqt_dist.data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from dqt_dist.dtypes import TORCH_DTYPES
from dqt_dist.errors import UserError
from dqt_dist.export import bitnet, compressed, hf, plain, tokenizer_check, verify
from dqt_dist.export.folder import check_output, new_folder
from dqt_dist.export.model_card import model_card
from dqt_dist.export.perplexity import compare_with_trained
from dqt_dist.export.record import RECORD, record_of, write_json
from dqt_dist.export.safetensors_writer import SHARD_BYTES, Entry, write_model
from dqt_dist.export.tokenizer_files import generation_config, known_limits, write_tokenizer
from dqt_dist.export.tokenizer_model import TokenizerModel, read_tokenizer, refuse
from dqt_dist.export.trainer_model import trainer_model
from dqt_dist.export.weights import Weights
from dqt_dist.progress_line import ProgressLine

HF_FORMATS = ("hf-bitnet", "hf-compressed", "hf")
FORMATS = (*HF_FORMATS, "gguf")


@dataclass
class Request:
    """What the command line asks for; None means the default that follows from the checkpoint."""

    checkpoint: Path
    output: Path
    format: str | None = None
    dtype: str | None = None
    ternary: bool = False
    of_latents: bool = False
    verify: bool = True
    tokenizer: Path | None = None
    gguf_type: str | None = None
    shard_bytes: int = SHARD_BYTES
    say: Callable[[str], None] = field(default=print)


def convert(request: Request) -> None:
    """Writes the export. Raises UserError for bad input and VerificationError when the result is not the model."""
    check_output(request.output)
    reader = CheckpointReader(request.checkpoint)
    dtype = TORCH_DTYPES[request.dtype or reader.config.quantization.dtype]
    _check_weights(request, reader)
    weights = Weights(reader, dtype, request.ternary, request.of_latents)
    export_format = request.format or default_format(weights)
    tokenizer = find_tokenizer(request.tokenizer, reader)
    require_packages(export_format, request.verify)
    tokenizer_model = read_tokenizer(tokenizer)
    refuse(tokenizer_model, export_format)
    with new_folder(request.output) as folder:
        if export_format == "gguf":
            from dqt_dist.export import gguf_file

            lines = gguf_file.export(folder, weights, tokenizer_model, request.gguf_type, request.verify, _progress)
            (folder / tokenizer.file_name).write_bytes(tokenizer.model)
        else:
            lines = _export_hf(folder, weights, tokenizer_model, export_format, request)
        record = record_of(weights, export_format, tokenizer)
        if weights.ternarize or weights.of_latents:
            lines += _tell_other_weights(record, weights, tokenizer, request.verify)
        write_json(folder / RECORD, record)
        (folder / "README.md").write_text(model_card(record))
    for line in lines:
        request.say(line)
    request.say(f"{request.output}: {export_format}, {_folder_bytes(request.output):,} bytes")


def _tell_other_weights(record: dict[str, Any], weights: Weights, tokenizer: Tokenizer, measured: bool) -> list[str]:
    """Marks the run's figures as those of the trained codes, and adds both perplexities when they are measured."""
    old = {name if "parameters" in name else f"trained_codes_{name}": v for name, v in record["figures"].items()}
    record["figures"] = {**old, "trained_codes_bits": weights.stored_grid.bits}
    if not measured:
        return []
    figures, line = compare_with_trained(weights, tokenizer)
    record["figures"] |= figures
    return [line]


def default_format(weights: Weights) -> str:
    """hf-bitnet for ternary codes, hf-compressed for other codes, hf for float weights."""
    quantization = weights.config.quantization
    if not weights.has_codes:
        return "hf"
    return "hf-bitnet" if quantization.bits == "ternary" and quantization.activation != "none" else "hf-compressed"


def require_packages(export_format: str, verified: bool) -> None:
    """Raises UserError naming what the format needs and is not installed."""
    needed = ["gguf"] if export_format == "gguf" else []
    if verified:
        # transformers asks for accelerate when it loads packed weights.
        needed += ["transformers", "accelerate"]
        needed += ["compressed_tensors"] if export_format == "hf-compressed" else []
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        hint = " (--no-verify needs less)" if verified else ""
        raise UserError(
            f"--format {export_format}: not installed: {', '.join(missing)}; pip install 'dqt_dist[export]'{hint}"
        )


def _check_weights(request: Request, reader: CheckpointReader) -> None:
    """Raises UserError for --bits or --weights that the checkpoint cannot give."""
    quantization = reader.config.quantization
    if request.ternary and quantization.method == "none":
        raise UserError('--bits ternary: the checkpoint has quantization.method = "none" and no codes')
    if not request.of_latents:
        return
    if quantization.latent_bits is None:
        raise UserError(
            f"--weights latent: {reader.path} has no latents (quantization.latent_bits is null); leave --weights out"
        )
    if request.format not in (None, "hf"):
        raise UserError(
            f"--weights latent: the values of latents are floats, and --format {request.format} holds integers; use "
            f"--format hf"
        )


def find_tokenizer(given: Path | None, reader: CheckpointReader) -> Tokenizer:
    """The tokenizer of a run: `given` by --tokenizer, the one that the run folder keeps, or the file that the config
    names.

    Raises UserError when there is none, or one that the model was not trained with.
    """
    run = reader.path.parent.parent
    configured = Path(reader.config.data.tokenizer)
    candidates = [given] if given else [*(run / name for name in TOKENIZER_FILES), configured]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        places = " and ".join(str(path) for path in candidates)
        raise UserError(f"tokenizer: no file {places}; give the tokenizer of the run by --tokenizer")
    tokenizer = load_tokenizer(found)
    check_tokenizer(tokenizer, reader.manifest, reader.path, run, where="--tokenizer" if given else "tokenizer")
    check_pieces(tokenizer, reader.config.model.vocab_size)
    return tokenizer


def check_pieces(tokenizer: Tokenizer, rows: int) -> None:
    """Raises UserError for a tokenizer with more pieces than the model has rows of its embedding."""
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"tokenizer {tokenizer.path}: {tokenizer.vocab_size} pieces, model.vocab_size is {rows}: not its tokenizer"
        )


# ---- Hugging Face folders ----


def _plan(weights: Weights, export_format: str) -> tuple[list[Entry], dict[str, Any] | None, int]:
    """Entries, quantization_config and bits per weight of the linears."""
    if export_format == "hf-bitnet":
        bitnet.check(weights)
        return bitnet.entries(weights), bitnet.quantization_config(), 2
    if export_format == "hf-compressed":
        compressed.check(weights)
        return compressed.entries(weights), compressed.quantization_config(weights), compressed.width(weights.grid)
    return plain.entries(weights), None, 8 * weights.dtype.itemsize


def _export_hf(
    folder: Path, weights: Weights, tokenizer: TokenizerModel, export_format: str, request: Request
) -> list[str]:
    entries, quantization, bits = _plan(weights, export_format)
    write_model(folder, entries, _progress, request.shard_bytes)
    write_json(folder / "config.json", hf.config_json(weights.config, weights.dtype, quantization, tokenizer.marks))
    write_json(folder / "generation_config.json", generation_config(tokenizer, weights.config.model.vocab_size))
    write_tokenizer(folder, tokenizer, weights.config.model.seq_length)
    verify.check_size(folder, weights, bits)
    if not request.verify:
        return [*known_limits(tokenizer), "not verified (--no-verify)"]
    return known_limits(tokenizer) + _verify_hf(folder, weights, tokenizer, export_format)


def _verify_hf(folder: Path, weights: Weights, tokenizer: TokenizerModel, export_format: str) -> list[str]:
    lines = [tokenizer_check.check_hf(folder, tokenizer)]
    tokens = verify.sample_tokens(tokenizer, weights.config.model.seq_length)
    with trainer_model(weights, "none") as trainer:
        floats = trainer(tokens)

    def compare(found: Tensor, wanted: Tensor, bound: verify.Bound, what: str) -> None:
        lines.append(f"{what}: {verify.compare(found, wanted, bound, what)}")

    against = "transformers against the trainer's model, activations"
    if export_format == "hf":
        exact = weights.dtype == torch.float32 or all(map(verify.is_power_of_two, weights.scales().values()))
        found = verify.transformers_logits(folder, tokens)
        compare(found, floats, verify.FLOAT if exact else verify.ROUNDED, f"{against} none")
    elif export_format == "hf-bitnet":
        verify.check_bitnet_linears(folder, weights)
    else:
        found = verify.transformers_logits(folder, tokens, verify.without_activations(folder))
        compare(found, floats, verify.FLOAT, f"{against} none")
    if export_format == "hf" or weights.config.quantization.activation == "none":
        return lines
    # The engine unchanged. Its 8-bit activations are int8, even for a run with e4m3.
    found = verify.transformers_logits(folder, tokens)
    with trainer_model(weights, "int8") as trainer:
        rounded = trainer(tokens)
    if export_format == "hf-bitnet":
        compare(found, rounded, verify.eight_bit_bound(rounded, floats), f"{against} int8")
        return lines
    own = verify.rounded_logits(
        folder, tokens, verify.without_activations(folder), weights.linears, compressed.round_activations
    )
    compare(found, own, verify.eight_bit_bound(own, floats), "transformers against inputs rounded as its format says")
    apart = verify.difference(found, rounded)
    lines.append(
        f"{against} int8: logits differ by at most {float(apart.max()):.1e}, on average {float(apart.mean()):.1e} of "
        "the largest, because this format scales activations by max/127.5 where training has max/127"
    )
    return lines


def _progress(entries: list[Entry]) -> Iterable[Entry]:
    return ProgressLine(entries, "tensors", unit=" tensors")


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
