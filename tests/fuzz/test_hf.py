"""Any Hugging Face folder: it becomes the weights of a run, or a model that computes, or it is refused by name.

Each file is damaged by its values, config.json and the header of the weights among them, and by its bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from dqt_dist.commands.convert_ckpt import main as convert
from dqt_dist.config import to_json
from dqt_dist.export import import_hf
from dqt_dist.export.hf_reader import INDEX, HfFolder, HfWeights
from dqt_dist.export.record import RECORD
from dqt_dist.inference.language_model import open_model
from tests.fuzz.damage import VOCAB_SIZE, budget, changed_bytes, changed_values, held
from tests.small import small_config

WEIGHTS = "model.safetensors"
LATENTS = "quantization.latent_bits=4"
MODEL = (f"model.vocab_size={VOCAB_SIZE}", "model.num_layers=1")
EXPORTS = {
    "hf": ("quantization.bits=ternary", LATENTS),
    "hf-bitnet": ("quantization.bits=ternary",),
    "pack-quantized": ("quantization.bits=4",),
    "int-quantized": ("quantization.bits=8",),
}


@pytest.fixture(scope="module")
def folders(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each kind of folder by its name: a model of transformers itself, in shards, and exports of what it became."""
    root = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    values = small_config(*MODEL).model
    config = LlamaConfig(
        vocab_size=values.vocab_size,
        hidden_size=values.hidden_size,
        intermediate_size=values.ffn_hidden_size,
        num_hidden_layers=values.num_layers,
        num_attention_heads=values.num_attention_heads,
        num_key_value_heads=values.num_query_groups,
        rms_norm_eps=values.norm_epsilon,
        max_position_embeddings=values.seq_length,
    )
    LlamaForCausalLM(config).save_pretrained(root / "published", max_shard_size="20KB")
    shutil.copy(prepared / "tokenizer.model", root / "published")
    for name, overrides in EXPORTS.items():
        file, run = root / f"{name}.json", root / f"run of {name}"
        file.write_text(to_json(small_config(*MODEL, *overrides, f"data.tokenizer={prepared / 'tokenizer.model'}")))
        of_published = ("--from-hf", root / "published", "--config", file, "--output", run)
        assert convert([str(word) for word in of_published]) == 0
        export_format = "hf-compressed" if name.endswith("-quantized") else name
        export = ("--checkpoint", run, "--output", root / name, "--format", export_format, "--no-verify")
        assert convert([str(word) for word in export]) == 0
    return {name: root / name for name in ("published", *EXPORTS)}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each input stands in turn."""
    return tmp_path_factory.mktemp("fuzz") / "folder"


def take(folder: Path, config_file: Path | None) -> None:
    """What `--from-hf` does with a folder, but for the model that it fills."""
    found = HfFolder(folder)
    weights = HfWeights(found, import_hf._config(found, config_file))
    for name in weights.linears:
        codes, scale = weights.codes(name)
        assert weights.grid.qmin <= codes.min() <= codes.max() <= weights.grid.qmax and 0 < scale < torch.inf
        if weights.latent_grid is not None:
            weights.latents(name)
    for name in weights.parameters:
        assert weights.parameter(name).isfinite().all()
    import_hf._progress(found)


def compute(folder: Path) -> None:
    """What evaluation and generation do with it."""
    opened = open_model(folder, device="cpu")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # see quiet_transformers
        assert opened.model(torch.arange(5)[None]).logits.shape == (1, 5, opened.vocab_size)


def header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Of a safetensors file, and the bytes of its tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


@st.composite
def damage(draw: st.DrawFn, folder: Path) -> Callable[[Path], None]:
    """Something done to a file of the copy that it is called with."""
    names = [path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
    name = draw(st.sampled_from(sorted({"config.json", *{RECORD, INDEX, WEIGHTS}.intersection(names), *names})))
    content = (folder / name).read_bytes()
    if draw(st.integers(0, 3)) == 0:
        changed = draw(changed_bytes(content))
    elif name.endswith(".json"):
        changed = json.dumps(draw(changed_values(json.loads(content)))).encode()
    else:
        values, tensors = header(content)
        text = json.dumps(draw(changed_values(values, most=2))).encode()
        changed = len(text).to_bytes(8, "little") + text + tensors
    return lambda copy: (copy / name).write_bytes(changed) and None


def copy_of(folder: Path, copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)


def names(path: Path) -> Callable[[str], bool]:
    return lambda message: str(path) in message and len(message) > len(str(path)) + 20


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """transformers says on standard error what it thinks of a folder."""
    from dqt_dist.export.verify import quiet_transformers

    with quiet_transformers():
        yield


@budget(150, share=0.2)
@given(data=st.data())
def test_whatever_folder_is_to_become_a_run(folders: dict[str, Path], damaged: Path, data: Any) -> None:
    kind = data.draw(st.sampled_from(sorted(folders)))
    copy_of(folders[kind], damaged)
    data.draw(damage(folders[kind]))(damaged)
    config = folders[kind].with_name("hf.json") if kind == "published" else None
    held(lambda: take(damaged, config), names(damaged))


@budget(60, share=0.05)
@given(data=st.data())
def test_whatever_folder_is_to_compute(quiet: None, folders: dict[str, Path], damaged: Path, data: Any) -> None:
    kind = data.draw(st.sampled_from(sorted(folders)))
    copy_of(folders[kind], damaged)
    data.draw(damage(folders[kind]))(damaged)
    held(lambda: compute(damaged), names(damaged))


@pytest.mark.parametrize("kind", ["published", *EXPORTS])
def test_the_folders_are_good(folders: dict[str, Path], kind: str) -> None:
    take(folders[kind], folders[kind].with_name("hf.json") if kind == "published" else None)
    compute(folders[kind])
