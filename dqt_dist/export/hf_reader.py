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
from dqt_dist.export.bitnet import CODES_PER_BYTE, unpack_rows
from dqt_dist.export.compressed import WORD_BITS, packed_columns, unpack_words
from dqt_dist.export.hf import key
from dqt_dist.export.hf_fields import COPY_AGAIN, FLOAT32, Architecture, HfConfig, Index, Record, Rope, read_fields
from dqt_dist.export.record import RECORD
from dqt_dist.export.weights import linear_shapes, parameter_shapes
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.latent import codes_of_latents, codes_per_latent, latents_of_codes
from dqt_dist.lowbit.rounding import round_nearest
from dqt_dist.lowbit.scale import WeightStatistics, choose_scale

ARCHITECTURES = {"LlamaForCausalLM": False, "BitNetForCausalLM": True}
"""Architectures that the trainer builds, and whether they have sub-norms."""

INDEX = "model.safetensors.index.json"


class HfFolder:
    """The fields of a folder's JSON files, and the tensors of its safetensors files, by name, read when asked for.

    Raises UserError for a folder without them, for wrong fields, and for a model that is none of ARCHITECTURES.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json there; give a Hugging Face folder (GGUF is not read)")
        self.folder = folder
        found = (read_fields(folder / "config.json", Architecture).architectures or ["none"])[0]
        if found not in ARCHITECTURES:
            raise UserError(f"{folder}: architecture {found}; the trainer builds {' and '.join(ARCHITECTURES)}")
        self.architecture = found
        self.config = read_fields(folder / "config.json", HfConfig)
        self.record = read_fields(folder / RECORD, Record) if (folder / RECORD).is_file() else None
        self.files = _files(folder)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, which is not read; raises UserError when it is missing."""
        if name not in self.files:
            raise UserError(f"{self.folder}: no tensor {name} in the safetensors files; {COPY_AGAIN}")
        with safe_open(self.files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor. Raises UserError when it is missing, has another shape or dtype, or floats that are not finite.

        dtype None is any kind of floats, which come as fp32.
        """
        found = self.shape(name)
        if shape is not None and found != shape:
            raise UserError(f"{self.folder}: {name} is {_sizes(found)}, the config makes it {_sizes(shape)}")
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if not tensor.is_floating_point() if dtype is None else tensor.dtype != dtype:
            wanted = "floats" if dtype is None else dtype
            raise UserError(f"{self.folder}: {name} is of {tensor.dtype}, should be {wanted}; {COPY_AGAIN}")
        if dtype is None and not (tensor := tensor.float()).isfinite().all():
            raise UserError(f"{self.folder}: {name} has values that are not finite; {COPY_AGAIN}")
        return tensor

    def check_sizes(self) -> None:
        """Raises UserError when the embedding or the number of layers is not that of config.json: for a reader that
        takes memory by config.json, and has no run to compare it with."""
        config = self.config
        embedding, wanted = self.shape(key("embed_tokens")), (config.vocab_size, config.hidden_size)
        if embedding != wanted:
            raise UserError(
                f"{self.folder}: {key('embed_tokens')} is {_sizes(embedding)}, vocab_size and hidden_size of "
                f"config.json are {_sizes(wanted)}; {COPY_AGAIN}"
            )
        prefix = key("layers", "")
        layers = len({name.removeprefix(prefix).split(".")[0] for name in self.files if name.startswith(prefix)})
        if layers != config.num_hidden_layers:
            raise UserError(
                f"{self.folder}: has tensors of {layers} layers, num_hidden_layers of config.json is "
                f"{config.num_hidden_layers}; {COPY_AGAIN}"
            )


def _sizes(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _files(folder: Path) -> dict[str, Path]:
    """The file of each tensor. The index counts where there is one and no model.safetensors, as for transformers."""
    index = folder / INDEX
    if (folder / "model.safetensors").exists() or not index.is_file():
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise UserError(f"{folder}: no *.safetensors there; other formats of weights are not read")
        return {name: path for path in paths for name in _names(path)}
    weight_map = read_fields(index, Index).weight_map
    missing = sorted(name for name in set(weight_map.values()) if not (folder / name).is_file())
    if missing:
        raise UserError(f"{index}: weight_map names {missing[0]}, which is not there; {COPY_AGAIN}")
    names = {file: _names(folder / file) for file in set(weight_map.values())}
    for name, file in weight_map.items():
        if name not in names[file]:
            raise UserError(f"{index}: weight_map.{name} is {file}, which has no such tensor; {COPY_AGAIN}")
    return {name: folder / file for name, file in weight_map.items()}


def _names(path: Path) -> set[str]:
    """The tensors of a file, by its header."""
    if not path.is_file():
        raise UserError(f"{path}: not a plain file; {COPY_AGAIN}")
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); {COPY_AGAIN}") from error


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
                f"{folder.folder}: its float masters are gone, BitNet b1.58 cannot go on from codes; give a "
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
            scale = self._choose_scale(name, self._float(name)) if scale is None else scale
            return codes_of_latents(latents, self._ratio(scale, latent_scale, len(latents)), self.grid), scale
        scale = self._recorded_scale(name)
        if self.packing and name in self.linears:
            codes, stored_scale = self._stored_codes(name)
            scale = stored_scale if scale is None else scale
            if self._same_grid():
                return codes, scale
            return self._quantize(name, codes * scale, None)
        return self._quantize(name, self._float(name), scale if self._same_grid() else None)

    def latents(self, name: str) -> tuple[Tensor, Tensor]:
        """int8 latents on the run's grid and their fp32 scale [], for a run with latents.

        Latents of an export of codes are those of the codes' own weights. In all other cases they are nearest to the
        floats of the folder.
        """
        assert self.latent_grid is not None and self.config.quantization.latent_sigmas is not None
        recorded = None if self.folder.record is None else self.folder.record.latent_scales.get(name)
        codes, scale, weight = None, None, None
        if self._has_codes():
            codes, scale = self.codes(name)
            weight = codes * scale
        else:
            weight = self._float(name)
        if recorded is not None:
            latent_scale = torch.tensor(recorded, dtype=torch.float32)
        else:
            latent_scale = self._choose_scale(name, weight, of_latents=True)
        if codes is None or scale is None:
            return round_nearest(weight / latent_scale, self.latent_grid), latent_scale
        return latents_of_codes(codes, self._ratio(scale, latent_scale, len(codes)), self.latent_grid), latent_scale

    def _ratio(self, scale: Tensor, latent_scale: Tensor, rows: int) -> Tensor:
        """r of each row."""
        return codes_per_latent(scale, latent_scale, self.config.quantization.latent_threshold).expand(rows)

    def _has_codes(self) -> bool:
        """Whether the folder holds codes of the run's grid, packed or as their values."""
        record = self.folder.record
        return self._same_grid() and record is not None and record.weights == "codes"

    def parameter(self, name: str) -> Tensor:
        """fp32 value of a parameter or of a linear of a method without codes."""
        if self.packing and name in self.linears:
            codes, stored_scale = self._stored_codes(name)
            recorded = self._recorded_scale(name)
            return codes * (stored_scale if recorded is None else recorded)
        return self._float(name)

    master = parameter

    def _float(self, name: str) -> Tensor:
        tied = name == "lm_head" and self.folder.config.tie_word_embeddings
        return self.folder.read(key("embed_tokens" if tied else name), {**self.linears, **self.parameters}[name])

    def _stored_codes(self, name: str) -> tuple[Tensor, Tensor]:
        """int8 codes of the folder's grid and their fp32 scale []."""
        rows, columns = self.linears[name]
        stored = self.folder.read(key(name, "weight_scale"))
        if not stored.numel() or stored.unique().numel() != 1:
            raise UserError(f"{self.folder.folder}: {name} has a scale a row, a low-bit matrix here has one")
        scale = stored.flatten()[0]
        if self.packing == "bitnet":
            packed = (rows // CODES_PER_BYTE, columns)
            codes, scale = unpack_rows(self.folder.read(key(name), packed, torch.uint8)), 1 / scale
        elif self.packing == "int-quantized":
            codes = self.folder.read(key(name), (rows, columns), torch.int8)
        else:
            codes = self._unpacked(name)
        if not FLOAT32.tiny <= scale <= FLOAT32.max:
            raise UserError(f"{self.folder.folder}: {name} has the scale {float(scale):g}; {COPY_AGAIN}")
        least, most = map(int, codes.aminmax())
        if self._same_grid() and not self.grid.qmin <= least <= most <= self.grid.qmax:
            raise UserError(
                f"{self.folder.folder}: {name} has codes from {least} to {most}, {self.grid.bits} bits have "
                f"{self.grid.qmin} to {self.grid.qmax}; {COPY_AGAIN}"
            )
        return codes, scale

    def _unpacked(self, name: str) -> Tensor:
        """int8 codes of a matrix whose width of codes follows from the length of a row of words."""
        (rows, columns), packed = self.linears[name], key(name, "weight_packed")
        found = self.folder.shape(packed)
        bits = found[1] * WORD_BITS // columns if len(found) == 2 else 0
        if not 2 <= bits <= 8:
            raise UserError(
                f"{self.folder.folder}: {packed} is {_sizes(found)}: no row of {columns} codes; {COPY_AGAIN}"
            )
        return unpack_words(self.folder.read(packed, (rows, packed_columns(columns, bits)), torch.int32), bits, columns)

    def _recorded_scale(self, name: str) -> Tensor | None:
        scale = None if self.folder.record is None else self.folder.record.scales.get(name)
        return None if scale is None else torch.tensor(scale, dtype=torch.float32)

    def _same_grid(self) -> bool:
        """Whether the exported codes are of the run's bits."""
        return self.folder.record is not None and self.folder.record.bits == self.grid.bits

    def _quantize(self, name: str, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        scale = self._choose_scale(name, weight) if scale is None else scale
        return round_nearest(weight / scale, self.grid), scale

    def _choose_scale(self, name: str, weight: Tensor, of_latents: bool = False) -> Tensor:
        """fp32 scale [] of codes or latents, by the rule of the run."""
        config = self.config.quantization
        grid, rule, sigmas = self.grid, config.scale_rule, config.scale_sigmas
        if of_latents:
            assert self.latent_grid is not None and config.latent_sigmas is not None
            grid, rule, sigmas = self.latent_grid, "sigma", config.latent_sigmas
        deviation, power_of_two = float(weight.std()), config.scale_power_of_two
        scale = 0.0
        if 0 < deviation <= FLOAT32.max:
            statistics = WeightStatistics.of(weight, deviation)
            scale = choose_scale(statistics, grid, rule, sigmas=sigmas, power_of_two=power_of_two)
        if not FLOAT32.tiny <= scale <= FLOAT32.max:
            raise UserError(
                f"{self.folder.folder}: the weights of {name} have the standard deviation {deviation:g}, which gives "
                "no scale in fp32; give a model that was trained"
            )
        return torch.tensor(scale)


def _packing(folder: HfFolder) -> str | None:
    """bitnet, pack-quantized, int-quantized, or None for floats; raises UserError for any other quantization."""
    quantization = folder.config.quantization_config
    if quantization is None:
        return None
    method = quantization.quant_method
    if method == "bitnet" and quantization.linear_class == "bitlinear":
        return "bitnet"
    if method == "compressed-tensors" and quantization.format in ("pack-quantized", "int-quantized"):
        return quantization.format
    raise UserError(
        f"{folder.folder}: quantization_config {method!r} is not read; use a folder of floats, or an export of this "
        "project"
    )


def check_architecture(folder: HfFolder, config: Config) -> None:
    """Raises UserError naming every field in which the folder's model is not the config's."""
    found, model = folder.config, config.model
    rope = found.rope_parameters or found.rope_scaling or Rope()
    # Where transformers lets a field out: as many key/value heads as heads, rotary embedding as in the first LLaMA.
    wanted = {
        "vocab_size": (found.vocab_size, model.vocab_size),
        "hidden_size": (found.hidden_size, model.hidden_size),
        "intermediate_size": (found.intermediate_size, model.ffn_hidden_size),
        "num_hidden_layers": (found.num_hidden_layers, model.num_layers),
        "num_attention_heads": (found.num_attention_heads, model.num_attention_heads),
        "num_key_value_heads": (found.num_key_value_heads or model.num_attention_heads, model.num_query_groups),
        "head_dim": (found.head_dim or model.head_dim, model.head_dim),
        "rms_norm_eps": (found.rms_norm_eps, model.norm_epsilon),
        "rope_theta": (rope.rope_theta or found.rope_theta or 10000.0, model.rope_base),
        "rope_type": (rope.rope_type or rope.type or "default", "default"),
        "hidden_act": (found.hidden_act, "silu"),
        "attention_bias": (found.attention_bias, False),
        "mlp_bias": (found.mlp_bias, False),
        "sub-norms (architecture)": (ARCHITECTURES[folder.architecture], model.sub_norm),
    }
    differing = [f"{name}: the folder has {a!r}, the run {b!r}" for name, (a, b) in wanted.items() if a != b]
    if differing:
        raise UserError("\n".join([f"{folder.folder}: not a model of this run", *differing]))
