"""The weights of a checkpoint as an export sees them: one logical matrix at a time, by its Hugging Face name.

    codes(name)      integer codes and scale of a low-bit matrix          W = scale * codes
    latents(name)    the finer integers behind the codes, and theirs      W = latent scale * latents
    matrix(name)     the same weight as floats, for formats without codes
    parameter(name)  embedding, head, norms, in the precision that the export stores

Nothing is kept: the largest matrix bounds the memory, whatever the size of the model. The codes depend on the method of
training: dqt stores codes, bitnet derives codes from the float master as its own forward does, none has no codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.config import Config, QuantizationConfig
from dqt_dist.errors import UserError
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.packing import unpack
from dqt_dist.lowbit.rounding import round_nearest
from dqt_dist.lowbit.scale import BITNET_SCALE_FLOOR

TERNARY = make_grid("ternary")


def linear_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """(rows, columns) = (out, in) of every linear of the blocks, in model order."""
    of_block = config.model.linear_shapes()
    return {f"layers.{i}.{part}": shape for i in range(config.model.num_layers) for part, shape in of_block.items()}


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of embedding, norms and head by logical name, in model order; norms are vectors."""
    model = config.model
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (model.vocab_size, hidden)}
    for i in range(model.num_layers):
        shapes[f"layers.{i}.input_layernorm"] = (hidden,)
        shapes[f"layers.{i}.post_attention_layernorm"] = (hidden,)
        if model.sub_norm:
            shapes[f"layers.{i}.self_attn.attn_sub_norm"] = (hidden,)
            shapes[f"layers.{i}.mlp.ffn_sub_norm"] = (ffn,)
    return shapes | {"norm": (hidden,), "lm_head": (model.vocab_size, hidden)}


class Weights:
    """What is exported of a checkpoint.

    `ternary` turns n-bit codes into ternary ones, the paper's ternary inference. `of_latents` takes the weights of the
    latents as plain floats, in place of the codes. `dtype` is the precision in which parameters are stored. `config`
    describes the exported model: its quantization is that of the exported weights. Raises UserError for a checkpoint
    whose tensors are not those of its config.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        dtype: torch.dtype = torch.float32,
        ternary: bool = False,
        of_latents: bool = False,
    ) -> None:
        _check_shapes(reader)
        self.reader, self.dtype, self.of_latents = reader, dtype, of_latents
        self.stored_grid = make_grid(reader.config.quantization.bits)
        self.ternarize = ternary and self.stored_grid != TERNARY
        self.config = reader.config
        if self.ternarize:
            quantization = reader.config.quantization.model_copy(update={"bits": "ternary"})
            self.config = reader.config.model_copy(update={"quantization": quantization})
        if of_latents:
            plain = QuantizationConfig(method="none", compute=reader.config.quantization.dtype)
            self.config = reader.config.model_copy(update={"quantization": plain})
        self.grid = make_grid(self.config.quantization.bits)
        self.linears = linear_shapes(self.config)
        self.parameters = parameter_shapes(self.config)

    @property
    def method(self) -> str:
        return self.config.quantization.method

    @property
    def has_codes(self) -> bool:
        return self.method != "none"

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """int8 codes [rows, columns] on `grid` and the fp32 scale [] of a low-bit matrix."""
        if self.method == "bitnet":
            return _bitnet_codes(self.master(name))
        packed = self.reader.read(f"codes/{name}")
        columns = {**self.linears, **self.parameters}[name][1]
        codes, scale = unpack(packed, self.stored_grid, columns), self.reader.read(f"scale/{name}").view(())
        return _ternary_codes(codes, scale) if self.ternarize else (codes, scale)

    def latents(self, name: str) -> tuple[Tensor, Tensor]:
        """int8 latents [rows, columns] and the fp32 scale [] of a low-bit matrix that has latents."""
        latent_bits = self.reader.config.quantization.latent_bits
        assert latent_bits is not None
        columns = {**self.linears, **self.parameters}[name][1]
        latents = unpack(self.reader.read(f"latent/{name}"), make_grid(latent_bits), columns)
        return latents, self.reader.read(f"latent_scale/{name}").view(())

    def latent_scales(self) -> dict[str, float]:
        """Scale of the latents of every matrix that has some, by name."""
        prefix = "latent_scale/"
        names = [name.removeprefix(prefix) for name in self.reader.tensors if name.startswith(prefix)]
        return {name: float(self.reader.read(f"{prefix}{name}")) for name in sorted(names)}

    def scale(self, name: str) -> Tensor:
        """The fp32 scale [] of a low-bit matrix; does not read the codes where it is stored."""
        if self.method == "bitnet" or self.ternarize:
            return self.codes(name)[1]
        return self.reader.read(f"scale/{name}").view(())

    def scales(self) -> dict[str, float]:
        """Scale of every matrix that is stored as codes, by name."""
        embeddings = ["embed_tokens", "lm_head"] if self.config.quantization.embeddings else []
        return {name: float(self.scale(name)) for name in [*self.linears, *embeddings]} if self.has_codes else {}

    def matrix(self, name: str) -> Tensor:
        """Weight of a linear as floats of `dtype` [rows, columns]; exact for codes with power-of-two scales."""
        if not self.has_codes:
            return self.parameter(name)
        codes, scale = self.codes(name)
        return (codes * scale).to(self.dtype)

    def parameter(self, name: str) -> Tensor:
        """Embedding, head (also where they are codes), norm, or float linear, in `dtype` and its shape in the model."""
        if self.of_latents and f"latent/{name}" in self.reader.tensors:
            latents, scale = self.latents(name)
            return (latents * scale).to(self.dtype)
        if f"codes/{name}" in self.reader.tensors:
            codes, scale = self.codes(name)
            return (codes * scale).to(self.dtype)
        return self.master(name).to(self.dtype)

    def master(self, name: str) -> Tensor:
        """The fp32 value that the optimizer keeps."""
        value = self.reader.read(f"parameter/{name}")
        return value[:, 0] if value.shape[1] == 1 else value


def _check_shapes(reader: CheckpointReader) -> None:
    """Raises UserError unless every weight of the config's model is there, in its shape."""
    config, tensors = reader.config, reader.tensors
    if config.model.num_layers > len(tensors):  # before anything is made for each layer
        raise UserError(f"{reader.path}: {config.model.num_layers} layers in its config, {len(tensors)} tensors")
    of_kinds = {"codes": config.quantization.bits, "latent": config.quantization.latent_bits}
    for name, shape in {**linear_shapes(config), **parameter_shapes(config)}.items():
        rows, columns = shape if len(shape) == 2 else (*shape, 1)
        packed = {f"{kind}/{name}": bits for kind, bits in of_kinds.items() if bits and f"{kind}/{name}" in tensors}
        wanted = {tensor: (rows, make_grid(bits).packed_columns(columns)) for tensor, bits in packed.items()}
        for tensor, wanted_shape in (wanted or {f"parameter/{name}": (rows, columns)}).items():
            found = tensors[tensor].shape if tensor in tensors else "none"
            if found != wanted_shape:
                raise UserError(f"{reader.path}: {tensor} is {wanted_shape} by its config, the checkpoint has {found}")


def _bitnet_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv 2402.17764, eq. 1 to 3; sums taken as in the training layer, so that the scale has its bits."""
    row_sums = weight.abs().sum(dim=1)
    total = torch.zeros(1).index_add_(0, torch.zeros(len(row_sums), dtype=torch.int64), row_sums)
    scale = (total / torch.tensor([weight.numel()])).clamp(min=BITNET_SCALE_FLOOR).view(())
    return round_nearest(weight / scale, TERNARY), scale


def _ternary_codes(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same quantiser applied to W = scale * codes; |codes| are summed as integers, which is exact."""
    mean = codes.to(torch.int64).abs().sum().double() / codes.numel()
    mean = mean.clamp(min=BITNET_SCALE_FLOOR)
    return round_nearest((codes.double() / mean).float(), TERNARY), (mean * scale.double()).float()
