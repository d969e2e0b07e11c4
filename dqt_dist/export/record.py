"""dqt_dist.json: what an export says of the run it came from, so that it can become a checkpoint again.

    config     complete config of the run, data paths as they stand there; its folder is left out, since it says nothing
               about the model
    progress   step, tokens, samples
    tokenizer_sha256   of the tokenizer that the model was trained with
    figures    losses and perplexities of the run's summary, where it has one
    format     the format of the export      bits   of its codes
    weights    "codes", or "latent" when the floats of the export are the latents' values
    scales     of every matrix that is stored as codes, fp32: with them codes come back from any format exactly
    latent_scales   the same of latents, where the run has some

The same file with the same weights gives the same export again, byte for byte.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.checkpoint.run_tokenizer import TOKENIZER_SHA256
from dqt_dist.data.tokenizer import Tokenizer
from dqt_dist.export.weights import Weights
from dqt_dist.training.summary import read_summary

RECORD = "dqt_dist.json"
FIGURES = ("valid_loss", "valid_perplexity", "last_loss", "parameters", "low_bit_parameters")
RUN_FOLDER = "runs/imported"


def record_of(weights: Weights, export_format: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """The record of an export."""
    reader = weights.reader
    # An export of latents is of a run with codes, and can become this run again.
    config = (reader.config if weights.of_latents else weights.config).model_dump(mode="json")
    config["checkpoint"]["dir"] = RUN_FOLDER
    return {
        "config": config,
        "progress": asdict(reader.progress),
        TOKENIZER_SHA256: tokenizer.sha256,
        "figures": figures_of(reader),
        "format": export_format,
        "bits": weights.config.quantization.bits if weights.has_codes else None,
        "weights": "latent" if weights.of_latents else "codes",
        "scales": Weights(reader).scales() if weights.of_latents else weights.scales(),
        "latent_scales": weights.latent_scales(),
    }


def figures_of(reader: CheckpointReader) -> dict[str, Any]:
    """Figures of the run when this is its last checkpoint; those that came with an imported model otherwise."""
    summary = read_summary(reader.path.parent.parent)
    if summary is not None and summary["steps"] == reader.progress.step:
        return {name: summary[name] for name in FIGURES if isinstance(summary.get(name), (int, float))}
    return reader.manifest.get("figures", {})


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
