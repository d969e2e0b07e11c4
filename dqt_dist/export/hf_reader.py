"""Reads a Hugging Face folder, plain LLaMA or one of our exports, as the weights of a run: one tensor at a time.

    codes in the folder, of the run's bits     taken as they are
    floats, or codes of other bits             quantised with the run's scale rule, or with the scale in dqt_dist.json

What is not the LLaMA that the trainer builds is refused: biases, other activation functions, scaled rotary embedding.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dqt_dist.config import Config
from dqt_dist.errors import UserError
from dqt_dist.export.bitnet import unpack_rows
from dqt_dist.export.compressed import unpack_words
from dqt_dist.export.hf import key
from dqt_dist.export.record import RECORD
from dqt_dist.export.weights import linear_shapes, parameter_shapes
from dqt_dist.json_files import read_json_object
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.latent import codes_of_latents, codes_per_latent, latents_of_codes
from dqt_dist.lowbit.rounding import round_nearest
from dqt_dist.lowbit.scale import WeightStatistics, choose_scale

ARCHITECTURES = {"LlamaForCausalLM": False, "BitNetForCausalLM": True}
"""Architectures that the trainer builds, and whether they have sub-norms."""

COPY_AGAIN = "copy the folder again, or export it again"
"""What helps where a file of it is damaged."""


class HfFolder:
    """The tensors of a folder's safetensors files, by name, read when asked for."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise UserError(f"--from-hf {folder}: no config.json there; give a Hugging Face folder (GGUF is not read)")
        self.folder = folder
        self.config = read_json_object(folder / "config.json", COPY_AGAIN)
        self.record = read_json_object(folder / RECORD, COPY_AGAIN) if (folder / RECORD).is_file() else None
        self.files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    self.files |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise UserError(f"{path}: not a whole safetensors file ({error})") from error
        if not self.files:
            raise UserError(f"--from-hf {folder}: no *.safetensors there; other formats of weights are not read")

    def read(self, name: str) -> Tensor:
        """One tensor; raises UserError when it is missing."""
        if name not in self.files:
            raise UserError(f"--from-hf {self.folder}: no tensor {name} in the safetensors files")
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)


class HfWeights:
    """A WeightSource for a run of `config`; raises UserError when the folder is not a model of this config."""

    def __init__(self, folder: HfFolder, config: Config) -> None:
        self.folder, self.config = folder, config
        self.linears, self.parameters = linear_shapes(config), parameter_shapes(config)
        self.grid = make_grid(config.quantization.bits)
        latent_bits = config.quantization.latent_bits
        self.latent_grid = None if latent_bits is None else make_grid(latent_bits)
        self.packing = _packing(folder)
        check_architecture(folder, config)
        if self.method == "bitnet" and (self.packing or folder.record):
            raise UserError(
                f"--from-hf {folder.folder}: its float masters are gone, BitNet b1.58 cannot go on from codes; give a "
                '--config with quantization.method = "dqt" or "none"'
            )

    @property
    def method(self) -> str:
        return self.config.quantization.method

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """int8 codes on the run's grid and their fp32 scale []."""
        if self.latent_grid is not None and not self._has_codes():
            latents, latent_scale = self.latents(name)
            scale = self._recorded_scale(name)
            scale = self._choose_scale(self._float(name)) if scale is None else scale
            return codes_of_latents(latents, self._ratio(scale, latent_scale, len(latents)), self.grid), scale
        scale = self._recorded_scale(name)
        if self.packing and name in self.linears:
            codes, stored_scale = self._stored_codes(name)
            scale = stored_scale if scale is None else scale
            if self._same_grid():
                return codes, scale
            return self._quantize(codes * scale, None)
        return self._quantize(self._float(name), scale if self._same_grid() else None)

    def latents(self, name: str) -> tuple[Tensor, Tensor]:
        """int8 latents on the run's grid and their fp32 scale [], for a run with latents.

        Latents of an export of codes are those of the codes' own weights. In all other cases they are nearest to the
        floats of the folder.
        """
        assert self.latent_grid is not None and self.config.quantization.latent_sigmas is not None
        recorded = (self.folder.record or {}).get("latent_scales", {}).get(name)
        codes, scale, weight = None, None, None
        if self._has_codes():
            codes, scale = self.codes(name)
            weight = codes * scale
        else:
            weight = self._float(name)
        if recorded is not None:
            latent_scale = torch.tensor(recorded, dtype=torch.float32)
        else:
            latent_scale = self._choose_scale(weight, of_latents=True)
        if codes is None or scale is None:
            return round_nearest(weight / latent_scale, self.latent_grid), latent_scale
        return latents_of_codes(codes, self._ratio(scale, latent_scale, len(codes)), self.latent_grid), latent_scale

    def _ratio(self, scale: Tensor, latent_scale: Tensor, rows: int) -> Tensor:
        """r of each row."""
        return codes_per_latent(scale, latent_scale, self.config.quantization.latent_threshold).expand(rows)

    def _has_codes(self) -> bool:
        """Whether the folder holds codes of the run's grid, packed or as their values."""
        return self._same_grid() and (self.folder.record or {}).get("weights", "codes") == "codes"

    def parameter(self, name: str) -> Tensor:
        """fp32 value of a parameter or of a linear of a method without codes."""
        if self.packing and name in self.linears:
            codes, stored_scale = self._stored_codes(name)
            recorded = self._recorded_scale(name)
            return codes * (stored_scale if recorded is None else recorded)
        return self._float(name)

    master = parameter

    def _float(self, name: str) -> Tensor:
        tied = name == "lm_head" and self.folder.config.get("tie_word_embeddings", False)
        tensor = self.folder.read(key("embed_tokens" if tied else name)).float()
        wanted = {**self.linears, **self.parameters}[name]
        if tuple(tensor.shape) != wanted:
            raise UserError(
                f"--from-hf {self.folder.folder}: {key(name)} is {tuple(tensor.shape)}, the config makes it {wanted}"
            )
        return tensor

    def _stored_codes(self, name: str) -> tuple[Tensor, Tensor]:
        rows, columns = self.linears[name]
        scale = self.folder.read(key(name, "weight_scale")).float()
        if self.packing == "bitnet":
            return unpack_rows(self.folder.read(key(name))), 1 / scale.view(())
        if scale.unique().numel() != 1:
            raise UserError(f"--from-hf {self.folder.folder}: {name} has a scale a row, a low-bit matrix here has one")
        if self.packing == "int-quantized":
            return self.folder.read(key(name)), scale.flatten()[0]
        words = self.folder.read(key(name, "weight_packed"))
        return unpack_words(words, words.shape[1] * 32 // columns, columns)[:rows], scale.flatten()[0]

    def _recorded_scale(self, name: str) -> Tensor | None:
        scale = (self.folder.record or {}).get("scales", {}).get(name)
        return None if scale is None else torch.tensor(scale, dtype=torch.float32)

    def _same_grid(self) -> bool:
        """Whether the exported codes are of the run's bits."""
        return self.folder.record is not None and self.folder.record.get("bits") == self.grid.bits

    def _quantize(self, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        scale = self._choose_scale(weight) if scale is None else scale
        return round_nearest(weight / scale, self.grid), scale

    def _choose_scale(self, weight: Tensor, of_latents: bool = False) -> Tensor:
        """fp32 scale [] of codes or latents, by the rule of the run."""
        config = self.config.quantization
        grid, rule, sigmas = self.grid, config.scale_rule, config.scale_sigmas
        if of_latents:
            assert self.latent_grid is not None and config.latent_sigmas is not None
            grid, rule, sigmas = self.latent_grid, "sigma", config.latent_sigmas
        statistics = WeightStatistics.of(weight, float(weight.std()))
        power_of_two = config.scale_power_of_two
        return torch.tensor(choose_scale(statistics, grid, rule, sigmas=sigmas, power_of_two=power_of_two))


def _packing(folder: HfFolder) -> str | None:
    """bitnet, pack-quantized, int-quantized, or None for floats; raises UserError for any other quantization."""
    quantization = folder.config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method")
    if method == "bitnet" and quantization.get("linear_class", "bitlinear") == "bitlinear":
        return "bitnet"
    if method == "compressed-tensors" and quantization.get("format") in ("pack-quantized", "int-quantized"):
        return quantization["format"]
    raise UserError(
        f"--from-hf {folder.folder}: quantization_config {method!r} is not read; use a folder of floats, or an "
        "export of "
        "this project"
    )


def check_architecture(folder: HfFolder, config: Config) -> None:
    """Raises UserError naming every field in which the folder's model is not the config's."""
    found, model = folder.config, config.model
    architecture = (found.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"--from-hf {folder.folder}: architecture {architecture}; the trainer builds {' and '.join(ARCHITECTURES)}"
        )
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    wanted = {
        "vocab_size": (found.get("vocab_size"), model.vocab_size),
        "hidden_size": (found.get("hidden_size"), model.hidden_size),
        "intermediate_size": (found.get("intermediate_size"), model.ffn_hidden_size),
        "num_hidden_layers": (found.get("num_hidden_layers"), model.num_layers),
        "num_attention_heads": (found.get("num_attention_heads"), model.num_attention_heads),
        "num_key_value_heads": (
            found.get("num_key_value_heads") or model.num_attention_heads,
            model.num_query_groups,
        ),
        "head_dim": (found.get("head_dim") or model.head_dim, model.head_dim),
        "rms_norm_eps": (found.get("rms_norm_eps"), model.norm_epsilon),
        "rope_theta": (rope.get("rope_theta", found.get("rope_theta", 10000.0)), model.rope_base),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "hidden_act": (found.get("hidden_act", "silu"), "silu"),
        "attention_bias": (found.get("attention_bias", False), False),
        "mlp_bias": (found.get("mlp_bias", False), False),
        "sub-norms (architecture)": (ARCHITECTURES[architecture], model.sub_norm),
    }
    differing = [f"{name}: the folder has {a!r}, the run {b!r}" for name, (a, b) in wanted.items() if a != b]
    if differing:
        raise UserError("\n".join([f"--from-hf {folder.folder}: not a model of this run", *differing]))
