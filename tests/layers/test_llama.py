"""The whole model against a LLaMA written in 60 lines of torch below, from the same logical weights.

The reference uses no Megatron, shards, fused matrices or packed codes. It takes a weight by its Hugging Face name,
computes in float64, and splits heads, rotates halves and groups queries as Hugging Face's LlamaForCausalLM does. The
tests compare the logits, and the gradient of the loss with respect to EVERY logical weight, at TP 1 and at TP 2 with
sequence parallelism.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqt_dist.config import Config
from dqt_dist.launch import Launch
from dqt_dist.layers.attention import document_mask
from dqt_dist.layers.build import build_model
from dqt_dist.layers.parameters import low_bit_matrices, parameters
from dqt_dist.lowbit.coordinates import ShardLayout
from dqt_dist.parallel import groups as process_groups
from dqt_dist.parallel import megatron_device
from tests.distributed import run_distributed
from tests.small import random_batches, small_config
from tests.tolerances import NETWORK_FP32, Tolerance

Weights = dict[str, Tensor]
Linear = Callable[[Tensor, Tensor], Tensor]

# ---- the reference ----


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def rotate(x: Tensor, base: float) -> Tensor:
    """RoPE on [b, heads, s, d]: the pair (i, i + d/2) turns by position * base^(-2i/d)."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * frequency
    left, right = x[..., :half], x[..., half:]
    return torch.cat(
        [left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()],
        dim=-1,
    )


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """Causal softmax attention, [b, heads, s, d] on keys and values of fewer heads, in documents that begin at starts
    [b, documents]."""
    share, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1).repeat(len(q), 1, 1, 1)
    for sample, begins in enumerate(starts.tolist()):
        for begin in begins:
            hidden[sample, :, begin:, :begin] = True
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def llama(samples: dict[str, Tensor], w: Weights, config: Config, linear: Linear) -> Tensor:
    """Logits [b, s, vocabulary] of a micro-batch. `linear(x, weight)` computes a linear of a block."""
    model, tokens = config.model, samples["tokens"]
    batch, length = tokens.shape
    starts = samples.get("document_starts", torch.zeros(batch, 1, dtype=torch.int32))

    def heads(x: Tensor, count: int) -> Tensor:
        return x.view(batch, length, count, -1).transpose(1, 2)

    def sub_norm(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, w[name], model.norm_epsilon) if model.sub_norm else x

    x = w["embed_tokens"][tokens]
    for i in range(model.num_layers):
        a, m = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        h = rms_norm(x, w[f"layers.{i}.input_layernorm"], model.norm_epsilon)
        q = rotate(heads(linear(h, w[f"{a}.q_proj"]), model.num_attention_heads), model.rope_base)
        k = rotate(heads(linear(h, w[f"{a}.k_proj"]), model.num_query_groups), model.rope_base)
        v = heads(linear(h, w[f"{a}.v_proj"]), model.num_query_groups)
        h = attend(q, k, v, starts).transpose(1, 2).reshape(batch, length, -1)
        x = x + linear(sub_norm(h, f"{a}.attn_sub_norm"), w[f"{a}.o_proj"])
        h = rms_norm(x, w[f"layers.{i}.post_attention_layernorm"], model.norm_epsilon)
        h = F.silu(linear(h, w[f"{m}.gate_proj"])) * linear(h, w[f"{m}.up_proj"])
        x = x + linear(sub_norm(h, f"{m}.ffn_sub_norm"), w[f"{m}.down_proj"])
    return rms_norm(x, w["norm"], model.norm_epsilon) @ w["lm_head"].t()


def plain_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def eight_bit(x: Tensor) -> Tensor:
    """Rounded to 8 bits with one scale per token, straight-through."""
    scale = x.detach().abs().amax(-1, keepdim=True) / 127
    return x + ((x / scale).round() * scale - x).detach()


def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    return plain_linear(eight_bit(x), weight)


def ternary(weight: Tensor) -> Tensor:
    scale = weight.detach().abs().mean()
    return weight + ((weight / scale).round().clamp(-1, 1) * scale - weight).detach()


def bitnet_linear(x: Tensor, weight: Tensor) -> Tensor:
    return plain_linear(x, ternary(weight))


def reference(weights: Weights, config: Config, batch: dict[str, Tensor], linear: Linear) -> tuple[Tensor, Weights]:
    """Logits, and gradients of the mean loss with respect to every weight, in float64."""
    leaves = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    logits = llama(batch, leaves, config, linear)
    F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    return logits.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


# ---- the model under test ----


def rectangles(layout: ShardLayout, shard: Tensor) -> list[tuple[str, tuple[int, int], int, int, np.ndarray]]:
    """Each block of a shard as (name, shape of the whole, first row, first column, values)."""
    found, first = [], 0
    shard = shard.detach().view(layout.rows, layout.columns)
    for block in layout.blocks:
        matrix = layout.matrices[block.matrix]
        values = shard[first : first + block.num_rows].numpy()
        found.append((matrix.name, (matrix.rows, matrix.columns), block.row, layout.column_offset, values))
        first += block.num_rows
    return found


def run_models(rank: int, world_size: int, configs: list[Config]) -> list[dict[str, Any]]:
    """Runs one model after the other over the same groups. All configs have the same layout."""
    groups = process_groups.initialize(configs[0], Launch(rank, world_size, rank, world_size, "test", "", 0))
    return [run_model(config, groups) for config in configs]


def run_model(config: Config, groups: process_groups.Groups) -> dict[str, Any]:
    """Builds the model and runs one batch forward and backward. Returns this rank's logits, weights and gradients."""
    model_chunks = build_model(config, groups)
    shake_norms(model_chunks)
    batch = random_batches(config, step=1, data_rank=0, data_size=1)[0]
    positions = torch.arange(config.model.seq_length).expand_as(batch["tokens"])
    mask = document_mask(batch["document_starts"], config) if config.data.document_masking else None
    with megatron_device.cuda_or_cpu():
        (model,) = model_chunks
        with torch.no_grad():
            logits = model(batch["tokens"], positions, mask)
        model(batch["tokens"], positions, mask, labels=batch["labels"]).mean().backward()
    weights, gradients = [], []
    for parameter in parameters(model_chunks):
        assert parameter.tensor.grad is not None
        weights += rectangles(parameter.layout, parameter.tensor)
        gradients += rectangles(parameter.layout, parameter.tensor.grad)
    for matrix in low_bit_matrices(model_chunks):
        assert matrix.layout is not None and matrix.gradient.local is not None
        weights += rectangles(matrix.layout, matrix.dequantize())
        gradients += rectangles(matrix.layout, matrix.gradient.local)
    return {"logits": logits.numpy(), "weights": weights, "gradients": gradients}


@torch.no_grad()
def shake_norms(model_chunks: nn.ModuleList) -> None:
    """Sets norm weights to a function of the place in the whole vector, so that a misplaced weight shows."""
    for parameter in parameters(model_chunks):
        if parameter.layout.columns == 1:
            parameter.tensor.copy_(1 + 0.5 * torch.sin(parameter.layout.row_logical().float()))


def whole_weights(results: Sequence[dict[str, Any]], key: str) -> Weights:
    """The logical tensors from the rectangles of every rank. Replicated vectors must be equal; none may be missing."""
    whole: Weights = {}
    for result in results:
        for name, shape, row, column, values in result[key]:
            tensor = whole.setdefault(name, torch.full(shape, float("nan")))
            place = tensor[row : row + values.shape[0], column : column + values.shape[1]]
            new = torch.from_numpy(values)
            assert bool((place.isnan() | (place == new)).all()), f"{name} differs between ranks"
            place.copy_(new)
    assert not any(bool(tensor.isnan().any()) for tensor in whole.values())
    return {name: tensor[:, 0] if tensor.shape[1] == 1 else tensor for name, tensor in whole.items()}


# ---- the comparison ----

METHODS: dict[str, tuple[list[str], Linear]] = {
    "none": (["quantization.method=none"], plain_linear),
    "dqt": (["quantization.method=dqt", "quantization.activation=none"], plain_linear),
    "dqt 4 bit": (["quantization.bits=4", "quantization.activation=none"], plain_linear),
    "dqt embeddings": (["quantization.embeddings=true", "quantization.activation=none"], plain_linear),
    "dqt documents": (["data.document_masking=true", "quantization.activation=none"], plain_linear),
    "dqt int8": (["quantization.method=dqt"], int8_linear),
    "bitnet": (["quantization.method=bitnet", "quantization.activation=none"], bitnet_linear),
}

INT8_NETWORK = Tolerance(
    2e-3,
    "an activation within fp32 noise of the border between two int8 codes may take the other one: 1/127 of its token's "
    "maximum in one of 32 inputs",
)


@dataclass(frozen=True)
class Found:
    """A model that ran: its config, and whole logits, weights and gradients put together from its ranks."""

    config: Config
    logits: Tensor
    weights: Weights
    gradients: Weights


Models = dict[tuple[str, bool, int], Found]


def settings(world_size: int) -> dict[tuple[str, bool], Config]:
    """Initial weights are fifteen times larger than in training, so attention is far from uniform and RoPE matters."""
    layout = [f"parallel.tensor={world_size}", f"parallel.sequence={'true' if world_size > 1 else 'false'}"]
    return {
        (method, sub_norm): small_config(
            "model.init_std=0.3", f"model.sub_norm={'true' if sub_norm else 'false'}", *layout, *overrides
        )
        for method, (overrides, _) in METHODS.items()
        for sub_norm in (False, True)
    }


@pytest.fixture(scope="module")
def models() -> Models:
    """Every model of this file by (method, sub_norm, TP size). Models of one TP size run in one call."""
    found = {}
    for world_size in (1, 2):
        configs = settings(world_size)
        by_rank = run_distributed(run_models, world_size, list(configs.values()))
        for (key, config), ranks in zip(configs.items(), zip(*by_rank, strict=True), strict=True):
            logits = torch.cat([torch.from_numpy(rank["logits"]) for rank in ranks], dim=-1)
            weights, gradients = whole_weights(ranks, "weights"), whole_weights(ranks, "gradients")
            found[*key, world_size] = Found(config, logits, weights, gradients)
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("sub_norm", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_model_equals_the_written_out_llama(models: Models, method: str, sub_norm: bool, world_size: int) -> None:
    found, linear = models[method, sub_norm, world_size], METHODS[method][1]
    batch = random_batches(found.config, step=1, data_rank=0, data_size=1)[0]
    expected_logits, expected_gradients = reference(found.weights, found.config, batch, linear)
    tolerance = INT8_NETWORK if linear is int8_linear else NETWORK_FP32
    tolerance.assert_close(found.logits, expected_logits, "logits")
    assert found.gradients.keys() == expected_gradients.keys() == found.weights.keys()
    for name, expected in expected_gradients.items():
        tolerance.assert_close(found.gradients[name], expected, name)


# ---- documents ----


def logits_of(rank: int, world_size: int, samples: dict[str, tuple[Tensor, Tensor | None]], *overrides: str) -> Any:
    """Logits [1, s, vocabulary] of one model for each (tokens [1, s], document starts [1, documents] or None)."""
    config = small_config("data.document_masking=true", "training.micro_batch_size=1", *overrides)
    groups = process_groups.initialize(config, Launch(rank, world_size, rank, world_size, "test", "", 0))
    (model,) = build_model(config, groups)
    logits = {}
    with megatron_device.cuda_or_cpu(), torch.no_grad():
        for name, (tokens, starts) in samples.items():
            mask = None if starts is None else document_mask(starts, config)
            logits[name] = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), mask).numpy()
    return logits


def test_a_document_has_the_logits_that_it_has_alone() -> None:
    """Tokens 6 to 15 are a document. In `alone` the document begins at 0, so that its angles are other ones."""
    tokens = torch.randint(64, (1, 16))
    other = torch.cat([(tokens[:, :6] + 1) % 64, tokens[:, 6:]], dim=1)
    packed, alone = torch.tensor([[0, 6]], dtype=torch.int32), torch.tensor([[0, 10]], dtype=torch.int32)
    samples: dict[str, tuple[Tensor, Tensor | None]] = {
        "packed": (tokens, packed),
        "after another": (other, packed),
        "alone": (tokens.roll(-6, 1), alone),
        "across": (tokens, None),
    }
    found = run_distributed(logits_of, 1, samples, "model.init_std=0.3", "quantization.activation=none")[0]
    document = {name: torch.from_numpy(logits)[:, 6:] for name, logits in found.items()}
    assert torch.equal(document["after another"], document["packed"])
    document["alone"] = torch.from_numpy(found["alone"])[:, :10]
    NETWORK_FP32.assert_close(document["packed"], document["alone"])
    # Negative control.
    assert float((document["across"] - document["alone"]).abs().max()) > 0.1 * float(document["alone"].abs().max())


# ---- its controls ----


def without_rope(x: Tensor, base: float) -> Tensor:
    return x


def rope_of_neighbours(x: Tensor, base: float, rotate: Callable[..., Tensor] = rotate) -> Tensor:
    """RoPE's other convention: the pair (2i, 2i + 1) turns."""
    half = x.shape[-1] // 2
    order = torch.arange(2 * half).view(half, 2).t().flatten()
    return rotate(x[..., order], base)[..., order.argsort()]


def other_groups(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, attend: Callable[..., Tensor] = attend) -> Tensor:
    return attend(q, k.flip(1), v.flip(1), starts)


def across_documents(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, attend: Callable[..., Tensor] = attend) -> Tensor:
    return attend(q, k, v, starts[:, :1])


def distance(found: Found, linear: Linear) -> float:
    """Largest difference of the logits from the reference's, relative to the largest logit."""
    batch = random_batches(found.config, step=1, data_rank=0, data_size=1)[0]
    logits, _ = reference(found.weights, found.config, batch, linear)
    return float((found.logits - logits).abs().max() / logits.abs().max())


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("rotate", without_rope),
        ("rotate", rope_of_neighbours),
        ("attend", other_groups),
        ("attend", across_documents),
    ],
)
def test_a_reference_that_is_wrong_in_one_part_is_far_away(
    models: Models, monkeypatch: pytest.MonkeyPatch, part: str, wrong: Callable[..., Tensor]
) -> None:
    """The comparison above distinguishes the conventions: measured was over 1, the tolerance is 5e-5."""
    monkeypatch.setattr(sys.modules[__name__], part, wrong)
    method = "dqt documents" if wrong is across_documents else "none"
    assert distance(models[method, False, 1], plain_linear) > 0.1


def test_a_reference_without_8_bit_activations_is_far_away(models: Models) -> None:
    """Measured was 0.037, the tolerance is 2e-3."""
    assert distance(models["dqt int8", False, 1], plain_linear) > 0.01
