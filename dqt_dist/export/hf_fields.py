"""What is read of the JSON files of a Hugging Face folder, which anybody may have written.

    config.json                     HfConfig
    model.safetensors.index.json    Index
    dqt_dist.json                   Record, where the folder is an export of this project

Only the fields below are looked at; others are let pass. Names and defaults are those of transformers. A null stands
where transformers writes one. `read_fields` refuses every other value by file and field. The tokenizer's files are read
by data/tokenizer_json.py. How to draw, which generation_config.json says for other engines, is a matter of the command
line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from dqt_dist.config import Bits, validated
from dqt_dist.json_files import read_json_object

COPY_AGAIN = "copy the folder again, or export it again"
"""What helps where a file of it is damaged."""

FLOAT32 = torch.finfo(torch.float32)
Scale = Annotated[float, Field(ge=FLOAT32.tiny, le=FLOAT32.max)]
"""Of a matrix, in fp32: neither zero nor infinite."""


class Fields(BaseModel):
    """Some fields of a JSON object, of strict types."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Rope(Fields):
    """The rotary embedding: `rope_parameters`, or `rope_scaling` of older versions."""

    rope_type: str | None = None
    type: str | None = None
    """The older name of rope_type."""
    rope_theta: PositiveFloat | None = None


class Quantization(Fields):
    """How the linears are stored."""

    quant_method: str | None = None
    linear_class: str = "bitlinear"
    format: str | None = None


class Architecture(Fields):
    """What the other fields of config.json mean."""

    architectures: Annotated[list[str], Field(min_length=1)] | None = None


class HfConfig(Architecture):
    """config.json of a LLaMA."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    max_position_embeddings: PositiveInt = 2048
    rms_norm_eps: PositiveFloat
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    rope_theta: PositiveFloat | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    quantization_config: Quantization | None = None


class Index(Fields):
    """Which of several safetensors files holds a tensor."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")]]
    """Names of files of the same folder, by tensor."""


class RecordedProgress(Fields):
    step: NonNegativeInt
    tokens: NonNegativeInt
    samples: NonNegativeInt


class RecordedData(Fields):
    model_config = ConfigDict(extra="allow")

    tokenizer: str


class RecordedConfig(Fields):
    """The config of the run, which may be one of another version: it is checked where it is used."""

    model_config = ConfigDict(extra="allow")

    data: RecordedData


class Record(Fields):
    """record.py tells what the fields mean."""

    config: RecordedConfig
    progress: RecordedProgress
    tokenizer_sha256: str | None = None
    figures: dict[str, int | float | str] = {}
    format: str = "hf"
    bits: Bits | None = None
    weights: Literal["codes", "latent"] = "codes"
    scales: dict[str, Scale] = {}
    latent_scales: dict[str, Scale] = {}


Kind = TypeVar("Kind", bound=Fields)


def read_fields(path: Path, kind: type[Kind]) -> Kind:
    """The fields of `kind` in the JSON object at `path`. Raises UserError with the file and a line per wrong field."""
    values = read_json_object(path, COPY_AGAIN)
    return validated(kind, {name: values[name] for name in kind.model_fields if name in values}, path)
