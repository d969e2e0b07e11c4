"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) for weights that exist as codes only.

    m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
    direction = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)

The direction does not depend on the weight. `lowbit/update.py` moves the weight by minus the learning rate times the
direction, applies decoupled weight decay, and rounds the result to the grid. `adamw_update_rows` does AdamW and this
update in one step. On CUDA this is one pass over memory, and the direction is never stored.

Moments have 32 bits or 8. With 8 bits, the direction is computed from the new moments before the moments are rounded.
m is rounded to signed and v to unsigned block floats (`lowbit/block_float.py`), with random bits of the word that also
rounds the code.

    state_bits 32   exp_avg, exp_avg_sq               fp32  [rows, columns]         8 bytes per weight
    state_bits 8    exp_avg, exp_avg_sq               uint8 [rows, columns]         2.0625 bytes per weight
                    exp_avg_scale, exp_avg_sq_scale   uint8 [rows, columns / 32]    exponents of blocks

With second_moment factored the means of `factored.py` stand for exp_avg_sq, and a weight takes 4 or 1.03 bytes:

    v = r c^T / mean(r) instead of v above, with r and c averaged by beta2
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dqt_dist.config import STATE_BLOCK, OptimizerConfig
from dqt_dist.kernels.low_bit_update import GRADIENT_LIMIT, AdamW, kernel_fits
from dqt_dist.lowbit.block_float import decode_signed, decode_unsigned, encode_signed, encode_unsigned, noise_of
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import RoundingKey, rounding_words, update_rows_reference
from dqt_dist.optim.factored import MEANS, new_means, row_factors, update_means
from dqt_dist.optim.owned_rows import OwnedRows, UpdateSettings
from dqt_dist.parallel.groups import Groups

Moments = dict[str, Tensor]
"""The moments of some rows by the names above. Those of an update with a factored second moment have, for exp_avg_sq,
row_factor fp32 [rows], which is r / mean(r), and column_mean fp32 [matrices, columns], both of this step."""


def adamw_direction(
    gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, beta1: float, beta2: float, epsilon: float
) -> Tensor:
    """Updates both moments in place (fp32, shape of `gradient`) and returns the direction, fp32.

    `step` counts from 1. The arithmetic is torch.optim.AdamW's, without the factor of the learning rate.
    """
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    return direction_of(exp_avg, exp_avg_sq, step=step, beta1=beta1, beta2=beta2, epsilon=epsilon)


def direction_of(
    exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, beta1: float, beta2: float, epsilon: float
) -> Tensor:
    """The direction from the moments of this step."""
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(epsilon)
    return exp_avg / denominator / (1 - beta1**step)


def new_moments(
    rows: int,
    columns: int,
    state_bits: int,
    device: torch.device | None = None,
    pin_memory: bool = False,
    second: bool = True,
) -> Moments:
    """Zeros; without `second` for the first moment only."""
    widths = {"exp_avg": columns} | ({"exp_avg_sq": columns} if second else {})
    dtype = torch.float32
    if state_bits == 8:
        widths |= {f"{name}_scale": columns // STATE_BLOCK for name in widths}
        dtype = torch.uint8
    return {
        name: torch.zeros(rows, width, dtype=dtype, device=device, pin_memory=pin_memory)
        for name, width in widths.items()
    }


def adamw_update_rows(
    weight: LowBitMatrix,
    gradient: Tensor,
    moments: Moments,
    start: int,
    clip: Tensor | None,
    learning_rate: float,
    adamw: AdamW,
    key: RoundingKey,
    counted: bool = True,
) -> Tensor:
    """One AdamW step of rows [start, start + len(gradient)): moments and codes change in place.

    `gradient` [n, columns] is fp32 or bf16 and is multiplied by `clip`, an fp32 scalar on the same device. A clip of
    0 skips the step: elements may not be finite, or may be above GRADIENT_LIMIT. Then no gradient is read, moments
    decay, and no code changes. A clip of None says that nobody has checked the elements. Then each
    element that is not finite, or is above GRADIENT_LIMIT, counts as zero. `moments` are those of the n rows;
    `key.step` is Adam's t.

    Returns counts of each part of each row, as `update_rows` of kernels/low_bit_update.py does.
    """
    if kernel_fits(weight):
        # Triton need not be installed where there is no CUDA.
        from dqt_dist.kernels.low_bit_update_triton import adamw_update_rows_triton

        return adamw_update_rows_triton(weight, gradient, moments, start, clip, learning_rate, adamw, key, counted)
    return adamw_update_rows_reference(weight, gradient, moments, start, clip, learning_rate, adamw, key)


def adamw_update_rows_reference(
    weight: LowBitMatrix,
    gradient: Tensor,
    moments: Moments,
    start: int,
    clip: Tensor | None,
    learning_rate: float,
    adamw: AdamW,
    key: RoundingKey,
) -> Tensor:
    """As `adamw_update_rows`, on any device."""
    if clip is None:
        gradient = torch.where(gradient.abs() < GRADIENT_LIMIT, gradient.float(), 0.0)
    else:
        gradient = torch.where(clip > 0, gradient.float() * clip, 0.0)
    words = rounding_words(weight, start, start + len(gradient), key)
    settings = {"step": key.step, "beta1": adamw.beta1, "beta2": adamw.beta2, "epsilon": adamw.epsilon}
    formats = {"exp_avg": (decode_signed, encode_signed), "exp_avg_sq": (decode_unsigned, encode_unsigned)}
    wide = {
        name: decode(moments[name], moments[f"{name}_scale"]) if f"{name}_scale" in moments else moments[name]
        for name, (decode, _) in formats.items()
        if name in moments
    }
    if "exp_avg_sq" in wide:
        direction = adamw_direction(gradient, **wide, **settings)
    else:
        row_matrix = weight.row_matrix[start : start + len(gradient)].long()
        exp_avg_sq = moments["row_factor"][:, None] * moments["column_mean"][row_matrix]
        direction = direction_of(wide["exp_avg"].lerp_(gradient, 1 - adamw.beta1), exp_avg_sq, **settings)
    for name, new in wide.items():
        if f"{name}_scale" in moments:
            codes, exponents = formats[name][1](new, noise_of(words))
            moments[name].copy_(codes)
            moments[f"{name}_scale"].copy_(exponents)
    if clip is not None:
        # With a clip of 0 neither the first moment nor weight decay may move codes: a code without direction is kept.
        direction = torch.where(clip > 0, direction, math.nan)
    latents = moments.get("latent")
    return update_rows_reference(weight, direction, start, learning_rate, adamw.weight_decay, key, words, latents)


class AdamWRule:
    """Two moments per weight, of 32 or 8 bits, or one and the means of the other.

    On CUDA one pass over a matrix, without temporaries. A factored second moment takes a pass over the gradients before
    that.
    """

    def __init__(self, config: OptimizerConfig, groups: Groups, rows_sharded: bool, offload: bool) -> None:
        self.config, self.groups, self.rows_sharded, self.offload = config, groups, rows_sharded, offload
        self.factored = config.second_moment == "factored"

    def new_state(self, rows: OwnedRows) -> dict[str, Tensor]:
        shape, device = (rows.stop - rows.start, rows.weight.columns), rows.weight.codes.device
        where = {"pin_memory": device.type == "cuda"} if self.offload else {"device": device}
        moments = new_moments(*shape, self.config.state_bits, **where, second=not self.factored)
        return moments | (new_means(rows) if self.factored else {})

    def prepare(self, shards: list[OwnedRows], means: list[Tensor], settings: UpdateSettings) -> None:
        """Updates factored second moments of all shards, before any shard is updated. A collective call."""
        if self.factored:
            assert settings.clip is not None and settings.norm is not None
            step = (settings.norm, settings.clip, 1 - self.config.beta2, 0.0)
            update_means(shards, means, *step, self.groups, self.rows_sharded)

    def update(self, rows: OwnedRows, mean: Tensor, settings: UpdateSettings) -> Iterator[Tensor]:
        """Updates moments and codes of the owned rows; yields the counts of each block's rows."""
        device, config = rows.weight.codes.device, self.config
        assert config.low_bit_beta1 is not None
        adamw = AdamW(config.low_bit_beta1, config.beta2, config.epsilon, settings.weight_decay)
        factors = row_factors(rows) if self.factored else None
        for block in rows.row_blocks(whole=device.type == "cuda" and not self.offload):
            kept = {name: tensor[block] for name, tensor in rows.state.items() if name not in MEANS}
            # Where nothing is offloaded, `to` returns the kept tensors themselves, and the update writes to these.
            moments = {name: tensor.to(device, non_blocking=True) for name, tensor in kept.items()}
            if factors is not None:
                moments |= {"row_factor": factors[block], "column_mean": rows.state["column_mean"]}
            start = rows.start + block.start
            yield adamw_update_rows(
                rows.weight,
                mean[block],
                moments,
                start,
                settings.clip,
                settings.learning_rate,
                adamw,
                settings.key,
                settings.counted,
            )
            if self.offload:
                for name, tensor in kept.items():
                    tensor.copy_(moments[name], non_blocking=True)
