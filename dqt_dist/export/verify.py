"""Is an exported model the trained one? Asks the real engine, on text, before the export gets its name.

    tokens      the exported tokenizer gives the ids of training (tokenizer_check.py)
    weights     every tensor of the model is in the file and every one of the file in the model
    size        the files hold the bytes that the bits of the weights make
    logits      engine against the trainer's own model (fp32, CPU)

Logits are compared where engine and trainer compute the same function. Only the order of fp32 sums differs then, and
the bound is tight (FLOAT). With activations rounded to 8 bits, most values also agree up to fp32 noise. A value near
the border of two codes may take the other code, a difference of 1/127 of its token's maximum. Such differences grow
from layer to layer, until the two models are as far apart as two independent roundings. `eight_bit_bound` measures this
distance: a model runs with and without rounding. Errors that such a bound would hide are looked for in the weights
themselves: `check_bitnet_linears`, or the logits of the engine without its rounding. An engine that rounds in another
way than training is compared with its own weights and inputs rounded in that way (`rounded_logits`), and what the two
ways differ by is told.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqt_dist.export.errors import VerificationError
from dqt_dist.export.hf import key
from dqt_dist.export.safetensors_writer import tensor_bytes
from dqt_dist.export.text import SAMPLE
from dqt_dist.export.tokenizer_model import TokenizerModel
from dqt_dist.export.weights import Weights
from dqt_dist.json_files import read_json_object


@dataclass(frozen=True)
class Bound:
    """Largest allowed difference of logits, relative to the largest logit, and what it is made of."""

    largest: float
    mean: float
    reason: str


# Two fp32 roundings: of 1 / s and of the division by it.
LINEAR_BOUND = 1e-6
FLOAT = Bound(1e-4, 1e-5, "fp32 sums in another order")
ROUNDED = Bound(5e-2, 5e-3, "scales that are no powers of two are rounded to the precision of the file")


def eight_bit_bound(rounded: Tensor, exact: Tensor) -> Bound:
    """The bound for two roundings of activations, from logits with 8-bit activations and with exact ones.

    Independent errors of equal size are sqrt(2) times that size apart; the largest of many varies more than their mean.
    """
    size = difference(exact, rounded)
    return Bound(2 * float(size.max()), 1.5 * float(size.mean()), "8-bit activations: what two roundings differ by")


@dataclass(frozen=True)
class Comparison:
    """Engine against trainer, relative to the largest logit."""

    largest: float
    mean: float
    same_argmax: float
    bound: Bound

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.largest:.1e}, on average {self.mean:.1e} of the largest; allowed "
            f"{self.bound.largest:.1e} and {self.bound.mean:.1e} ({self.bound.reason}); the same best token at "
            f"{self.same_argmax:.1%} of positions"
        )


def difference(engine: Tensor, trainer: Tensor) -> Tensor:
    """Of logits, relative to the largest one of the trainer."""
    return (engine.double() - trainer.double()).abs() / trainer.double().abs().max()


def compare(engine: Tensor, trainer: Tensor, bound: Bound, what: str) -> Comparison:
    """Raises VerificationError when logits [batch, sequence, vocabulary] are further apart than `bound`."""
    if engine.shape != trainer.shape:
        raise VerificationError(f"{what}: logits of shape {tuple(engine.shape)}, the trainer's {tuple(trainer.shape)}")
    apart = difference(engine, trainer)
    same = (engine.argmax(-1) == trainer.argmax(-1)).float().mean()
    found = Comparison(float(apart.max()), float(apart.mean()), float(same), bound)
    # `not <=` also catches nan.
    if not (found.largest <= bound.largest and found.mean <= bound.mean):
        raise VerificationError(f"{what}: {found}")
    return found


def sample_tokens(tokenizer: TokenizerModel, sequence_length: int) -> Tensor:
    """Ids [1, at most sequence_length] of the sample text."""
    return torch.tensor([tokenizer.encode(SAMPLE)[:sequence_length]])


def check_size(folder: Path, weights: Weights, bits: int) -> None:
    """Raises VerificationError when the safetensors files do not hold `bits` per weight.

    Beside its codes a linear may have its shape and, per row, a scale and the padding of the last word.
    """
    of_codes = sum(rows * columns for rows, columns in weights.linears.values()) * bits / 8
    beside = sum(8 * rows + 16 for rows, _ in weights.linears.values())
    of_parameters = sum(math.prod(shape) for shape in weights.parameters.values()) * weights.dtype.itemsize
    found, least = tensor_bytes(folder), of_codes + of_parameters
    if not least <= found <= least + beside:
        raise VerificationError(
            f"the files hold {found:,} bytes of tensors; {bits} bits a weight make {least:,.0f}, and at most "
            f"{beside:,} "
            "for scales"
        )


def is_power_of_two(scale: float) -> bool:
    return math.frexp(scale)[0] == 0.5


def without_activations(folder: Path) -> dict[str, Any]:
    """quantization_config of a compressed-tensors folder with the 8-bit rounding of activations left out."""
    quantization = read_json_object(folder / "config.json", "export it again")["quantization_config"]
    for group in quantization["config_groups"].values():
        group["input_activations"] = None
    return quantization


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No weight bars, no advice, and no torch.compile: bitnet's forward would spend a minute compiling."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.compiler.set_stance("force_eager")
    try:
        # compressed-tensors draws four bars a model. Errors are exceptions.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        torch.compiler.set_stance("default")
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)


def load_folder(
    folder: Path,
    quantization: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    own_generation_config: bool = True,
    **load: Any,
) -> Any:
    """The model of transformers, its floats in `dtype`; raises VerificationError for missing or unused tensors.

    own_generation_config: whether the folder's generation_config.json is read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, **load)
    if quantization is not None:
        config.quantization_config = quantization
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        generation_config=None if own_generation_config else GenerationConfig(),
        dtype=dtype,
        output_loading_info=True,
        use_safetensors=None if load else True,  # never a pickle that lies beside; `load` is of GGUF
        trust_remote_code=False,
        **load,
    )
    model, info = loaded
    problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if problems:
        raise VerificationError(f"transformers does not find the tensors it wants: {problems}")
    return model.eval()


@torch.no_grad()
def transformers_logits(
    folder: Path, tokens: Tensor, quantization: dict[str, Any] | None = None, **load: Any
) -> Tensor:
    """Loads the folder in fp32 with transformers and runs it; raises VerificationError for missing or unused tensors.

    `quantization` replaces the quantization_config of the folder; `load` goes to from_pretrained.
    """
    with quiet_transformers():
        return load_folder(folder, quantization, **load)(tokens).logits.float()


@torch.no_grad()
def rounded_logits(
    folder: Path, tokens: Tensor, quantization: dict[str, Any], linears: Iterable[str], rounding: Callable
) -> Tensor:
    """Logits of transformers that rounds nothing itself: `rounding` gives the inputs of `linears`."""
    with quiet_transformers():
        model = load_folder(folder, quantization)
        for name in linears:
            linear = model.get_submodule(key(name, "")[:-1])
            linear.register_forward_pre_hook(lambda _, inputs: (rounding(inputs[0]), *inputs[1:]))
        return model(tokens).logits.float()


@torch.no_grad()
def check_bitnet_linears(folder: Path, weights: Weights) -> None:
    """Each packed linear of the loaded model against scale * codes, on inputs that 8-bit rounding does not change.

    Integers with a maximum of 127 are their own codes: no rounding hides a difference here, as it may in logits.
    """
    generator = torch.Generator().manual_seed(0)
    with quiet_transformers():
        model = load_folder(folder)
        for name, (_, columns) in weights.linears.items():
            probe = torch.randint(-127, 128, (8, columns), generator=generator).float()
            probe[:, 0] = 127
            codes, scale = weights.codes(name)
            wanted = (probe.double() @ codes.double().t()) * scale.double()
            found = model.get_submodule(key(name, "")[:-1])(probe)
            error = float((found.double() - wanted).abs().max() / wanted.abs().max())
            if not error <= LINEAR_BOUND:
                raise VerificationError(
                    f"{name}: the engine's product differs by {error:.1e} of the largest, allowed {LINEAR_BOUND:.0e}"
                )
