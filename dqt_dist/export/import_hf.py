"""From a Hugging Face folder to a training checkpoint: the way back of `convert`.

Codes, scales and parameters come from the folder, moments start at zero. An export of this project holds its
configuration and progress, so training continues with the next batch. Any other model needs the configuration of the
run and starts at step 0.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dqt_dist.checkpoint.folder import Progress
from dqt_dist.checkpoint.run_tokenizer import TOKENIZER_SHA256, check_tokenizer
from dqt_dist.command_line import as_typed
from dqt_dist.config import Config, config_of, load_config, to_json
from dqt_dist.data.tokenizer import kept_tokenizer, load_tokenizer
from dqt_dist.errors import UserError
from dqt_dist.export.folder import check_output, new_folder
from dqt_dist.export.hf_reader import HfFolder, HfWeights
from dqt_dist.export.record import RECORD
from dqt_dist.export.trainer_model import alone, fill, world_of_one
from dqt_dist.lowbit.packing import pack

if TYPE_CHECKING:
    from dqt_dist.optim.owned_rows import OwnedRows


def import_hf(source: Path, output: Path, config_file: Path | None, tokenizer: Path | None) -> None:
    """Makes the run folder `output` with one checkpoint. Raises UserError for what cannot become one."""
    check_output(output)
    folder = HfFolder(source)
    config = _with_folder(_config(folder, config_file), output)
    weights = HfWeights(folder, config)
    progress = _progress(folder)
    record = folder.record
    provenance: dict[str, Any] = {"figures": {} if record is None else record.figures}
    tokenizer_file, loaded = tokenizer or kept_tokenizer(source), None
    if tokenizer_file is not None:
        loaded = load_tokenizer(tokenizer_file)
        where = "--tokenizer" if tokenizer else "tokenizer"
        check_tokenizer(loaded, {} if record is None else record.model_dump(), source, source, where)
        provenance[TOKENIZER_SHA256] = loaded.sha256
    with new_folder(output) as scratch:
        if loaded is not None:
            (scratch / loaded.file_name).write_bytes(loaded.model)
        (scratch / "config.json").write_text(to_json(config))
        _save(weights, config, scratch, progress, provenance)
    train_on = f"{as_typed('dqt-pretrain')} --config {shlex.quote(str(output / 'config.json'))}"
    print(f"{output}: a checkpoint at step {progress.step}; train on: {train_on}")


def _config(folder: HfFolder, config_file: Path | None) -> Config:
    """The configuration of the run: the given file, or the one that the export brings."""
    if config_file is not None:
        return load_config(config_file)
    if folder.record is None:
        raise UserError(f"{folder.folder}: has no {RECORD}; give the configuration of the run by --config")
    return config_of(folder.record.config.model_dump(), f"{folder.folder / RECORD}: config")


def _with_folder(config: Config, output: Path) -> Config:
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"dir": str(output)})})


def _progress(folder: HfFolder) -> Progress:
    return Progress(0, 0, 0) if folder.record is None else Progress(**folder.record.progress.model_dump())


def _fill_latents(all_rows: list[OwnedRows], weights: HfWeights) -> None:
    """Overwrites latents and their scales. One process owns all rows."""
    for rows in all_rows:
        weight = rows.weight
        assert weight.layout is not None and weight.latent_grid is not None
        for index, logical in enumerate(weight.layout.matrices):
            latents, weight.latent_scale[index] = weights.latents(logical.name)
            packed = pack(latents, weight.latent_grid)
            for part, row, local, count in weight.layout.pieces(rows.start, rows.stop):
                if part == logical:
                    rows.state["latent"][local : local + count] = packed[row : row + count]


def _save(weights: HfWeights, config: Config, run: Path, progress: Progress, provenance: dict[str, Any]) -> None:
    """Builds model and optimizer in this process, fills the model and saves both as the trainer does."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from dqt_dist.checkpoint import store
    from dqt_dist.layers.build import build_model
    from dqt_dist.optim.engine import build_engine

    one_process = alone(config, config.quantization.activation)
    training = one_process.training.model_copy(update={"global_batch_size": one_process.training.micro_batch_size})
    one_process = one_process.model_copy(update={"training": training})
    with world_of_one(one_process) as groups:
        model_chunks = build_model(one_process, groups)
        fill(model_chunks, weights)
        engine = build_engine(model_chunks, one_process, groups)
        writer = store.open_writer(_with_folder(one_process, run))
        try:
            if config.quantization.latent_bits is not None:
                _fill_latents(engine.optimizer.low_bit.rows, weights)
            store.save(writer, model_chunks, engine.optimizer, config, progress, provenance)
        finally:
            writer.close()
