"""GGUF exports run by llama.cpp itself (`make test-gguf` builds it): its logits are those of a reference.

llama.cpp multiplies codes by codes. It rounds the input of every linear of codes to 8 bits, in blocks along the row.

    Q8_K  blocks of 256, scale fp32: signed maximum -> -127       for TQ2_0, TQ1_0, Q6_K
    Q8_0  blocks of  32, scale fp16: largest magnitude -> 127     for Q2_0, Q4_0, Q5_0, Q8_0

The reference is transformers' fp32 model of the `hf` export with the same rounding before its linears. Both then differ
by the order of fp32 sums only, unless a value lies so near the border of two codes that this order decides between the
codes. One such value moves logits by a few hundredths. The tests therefore compare the windows of text whose values are
farthest from borders in the reference, and the median window has to agree. A wrong file or a wrong rounding is wrong in
all windows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dqt_dist.data.tokenizer import load_tokenizer
from dqt_dist.export.gguf_file import FILE
from dqt_dist.export.text import SAMPLE
from dqt_dist.export.verify import quiet_transformers
from tests.export.conftest import Exported, Trained, convert
from tests.export.test_hf import NONE, bits
from tests.tolerances import assert_within

pytestmark = pytest.mark.gguf

NUM_TOKENS = 32
NUM_WINDOWS = 512
NUM_COMPARED = 9
# Logits of up to 6 after fp32 sums in another order: 1.4e-6 to 4e-6 was measured.
FP32 = 1e-5
PADDED = "model.ffn_hidden_size=320"
WIDE = ("model.hidden_size=512", "model.ffn_hidden_size=768")
NARROW = ("model.hidden_size=128", "model.ffn_hidden_size=352")
TWO_LAYERS = "model.num_layers=2"
LLAMA_F32 = 0  # GGML_TYPE_F32

Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x [windows, tokens, columns] -> x as llama.cpp rounds it, and for each window the smallest distance of a value from
where it would be rounded to another one, in codes (1/127 of a block's maximum)."""


# ---- how llama.cpp rounds ----


def to_border(values: Tensor) -> Tensor:
    """Distance of each value from the border of two integers."""
    return (values - values.floor() - 0.5).abs()


def divide(a: Tensor | float, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: the blocks of zeros."""
    return torch.where(b == 0, 0, a / b)


def q8_k(x: Tensor) -> tuple[Tensor, Tensor]:
    # A feed-forward size that fills no whole block is padded.
    blocks = nn.functional.pad(x, (0, -x.shape[-1] % 256)).unflatten(-1, (-1, 256))
    signed_maximum = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = divide(-127, signed_maximum)
    codes = blocks * inverse
    rounded = (codes.round() * divide(1, inverse)).flatten(-2)[..., : x.shape[-1]]
    return rounded, to_border(codes).flatten(1).amin(1)


def q8_0(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = x.unflatten(-1, (-1, 32))
    maximum = blocks.abs().amax(-1, keepdim=True)
    codes, scale = blocks * divide(127, maximum), maximum / 127
    # The scale has a border as well: fp16 keeps 11 significant bits.
    significant = torch.frexp(scale).mantissa * 2**11
    scale_to_border = divide(127 * to_border(significant), significant)
    rounded = (codes.round() * scale.half()).flatten(-2)
    return rounded, torch.minimum(to_border(codes).flatten(1).amin(1), scale_to_border.flatten(1).amin(1))


ROUNDINGS = {"TQ2_0": q8_k, "TQ1_0": q8_k, "Q6_K": q8_k, "Q2_0": q8_0, "Q4_0": q8_0, "Q5_0": q8_0, "Q8_0": q8_0}


@torch.no_grad()
def reference(
    folder: Path, tokens: Tensor, rounding: Rounding | None, bf16_head: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits [windows, tokens, vocabulary] of the `hf` export in `folder`, and the distances [windows] of a Rounding.

    `bf16_head` rounds the input of the head to bf16, as llama.cpp does for a matrix in bf16.
    """
    distance = torch.full(tokens.shape[:1], 0.5)

    def hook(module: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        rounded, found = rounding(arguments[0])
        torch.minimum(distance, found, out=distance)
        return rounded

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, module in model.named_modules():
            if rounding and name.endswith("_proj"):
                module.register_forward_pre_hook(hook)
        if bf16_head:
            model.lm_head.register_forward_pre_hook(lambda head, arguments: arguments[0].bfloat16().float())
        return model(tokens).logits, distance


# ---- llama.cpp ----


@contextmanager
def llama_cpp_model(file: Path) -> Iterator[Any]:
    """The file in llama.cpp with the arithmetic of the reference; logits of all positions, KV cache in F32."""
    import llama_cpp

    with pytest.MonkeyPatch.context() as patch:
        parameters = llama_cpp.llama_model_default_params()
        # Matrices re-packed for AMX: Q8_0, Q4_0 and Q6_K ended the process on one CPU that has it (llama.cpp 0c1e570,
        # g++ 12).
        parameters.use_extra_bufts = False
        patch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", lambda: parameters)
        model = llama_cpp.Llama(
            str(file), n_ctx=256, logits_all=True, type_k=LLAMA_F32, type_v=LLAMA_F32, verbose=False
        )
    try:
        yield model
    finally:
        model.close()


def differences(file: Path, tokens: Tensor, wanted: Tensor) -> Tensor:
    """Largest difference of a logit of llama.cpp from `wanted` in each window, sorted."""
    found = []
    with llama_cpp_model(file) as model:
        for window in tokens:
            model.reset()
            model.eval(window.tolist())
            found.append(torch.from_numpy(model.scores[: len(window)].copy()))
    return (torch.stack(found) - wanted).abs().flatten(1).amax(1).sort().values


@pytest.fixture(scope="session")
def gguf_export(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """gguf_export(block, *overrides): the file of linears in this block type, None for floats; made once."""

    @functools.cache
    def export(block: str | None, *overrides: str) -> Path:
        output = tmp_path_factory.mktemp("gguf") / "out"
        arguments = ("--checkpoint", trained(*overrides), "--output", output, "--format", "gguf", "--dtype", "fp32")
        assert convert(*arguments, "--no-verify", *(("--gguf-type", block) if block else ())) == 0
        return output / FILE

    return export


@pytest.fixture(scope="session")
def windows(tokenizer_file: Path) -> Tensor:
    """Tokens [windows, tokens] of real text."""
    ids = load_tokenizer(tokenizer_file).encode("\n".join(topics.values()))
    return torch.tensor(ids[-NUM_WINDOWS * NUM_TOKENS :]).view(NUM_WINDOWS, NUM_TOKENS)


# ---- tests ----


@pytest.mark.parametrize(
    ("block", "overrides"),
    [
        ("TQ2_0", ()),
        ("TQ1_0", ()),
        ("TQ2_0", (PADDED,)),
        ("TQ2_0", WIDE),
        ("TQ1_0", WIDE),
        ("Q2_0", ()),
        ("Q2_0", NARROW),
        ("Q4_0", (bits(2),)),
        ("Q4_0", (bits(4),)),
        ("Q5_0", (bits(5),)),
        ("Q6_K", (bits(6),)),
        ("Q8_0", (bits(8),)),
        (None, (NONE, TWO_LAYERS)),
    ],
    ids=str,
)
def test_logits_are_those_of_the_reference(
    exported: Exported, gguf_export: Callable[..., Path], windows: Tensor, block: str | None, overrides: tuple[str, ...]
) -> None:
    rounding = ROUNDINGS[block] if block else None
    wanted, distance = reference(exported("hf", *overrides), windows, rounding)
    chosen = distance.topk(NUM_COMPARED).indices
    found = differences(gguf_export(block, *overrides), windows[chosen], wanted[chosen])
    assert found.median() <= FP32, found


def test_head_and_embedding_in_bf16(exported: Exported, windows: Tensor) -> None:
    """Negative control: with the input of the head not rounded, logits are others."""
    folder, file = exported("hf", dtype="bf16"), exported("gguf", dtype="bf16") / FILE
    # Ratios of bf16 numbers are often on a border: shorter windows, of which enough have none.
    windows = windows.view(-1, 8)
    tokens = windows[reference(folder, windows, q8_k)[1].topk(NUM_COMPARED).indices]
    found = differences(file, tokens, reference(folder, tokens, q8_k, bf16_head=True)[0])
    # A value beside the border of two bf16 numbers may take the other one, 2^-8 away, times a weight: up to 8e-4 was
    # measured.
    assert found.median() <= 1e-3, found
    assert differences(file, tokens, reference(folder, tokens, q8_k)[0]).min() > 1e-3


@pytest.mark.parametrize("rounding", [None, q8_0], ids=["as they are", "q8_0"])
def test_other_activations_have_other_logits(
    exported: Exported, gguf_export: Callable[..., Path], windows: Tensor, rounding: Rounding | None
) -> None:
    """Negative control: a reference that does not round, or by blocks of another type."""
    tokens = windows[:NUM_COMPARED]
    found = differences(gguf_export("TQ2_0"), tokens, reference(exported("hf"), tokens, rounding)[0])
    assert found.min() > 1e-3, found


@pytest.fixture(scope="session")
def tokenizing_model(gguf_export: Callable[..., Path]) -> Iterator[Any]:
    with llama_cpp_model(gguf_export("TQ2_0")) as model:
        yield model


def test_text_has_the_ids_of_sentencepiece(tokenizing_model: Any, tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_file)
    for text in (SAMPLE, *list(topics.values())[-20:]):
        ids = tokenizing_model.tokenize(text.encode(), add_bos=False)
        assert ids == tokenizer.encode(text)
        # Unlike SentencePiece, llama.cpp keeps the space that stands before every text.
        assert tokenizing_model.detokenize(ids).decode() == " " + text


@given(
    text=st.text(
        alphabet=st.one_of(st.sampled_from("abcdef thisreturn\n\t  12<>/"), st.characters(exclude_categories=["Cs"]))
    )
)
def test_any_text_has_the_ids_of_sentencepiece(tokenizing_model: Any, tokenizer_file: Path, text: str) -> None:
    """NUL ends a text for SentencePiece's Python package."""
    if "\0" not in text:
        ids = tokenizing_model.tokenize(text.encode(), add_bos=False)
        assert ids == load_tokenizer(tokenizer_file).encode(text)


def test_greedy_text_is_that_of_the_reference(exported: Exported, gguf_export: Callable[..., Path]) -> None:
    """llama.cpp as a user starts it, keys and values in fp16: each token is the reference's best, but for near ties."""
    import llama_cpp

    model = llama_cpp.Llama(str(gguf_export("TQ2_0")), verbose=False)
    prompt = model.tokenize(b"The list", add_bos=False)
    tokens = prompt + list(islice(model.generate(prompt, temp=0.0), 16))
    text = model.create_completion("The list", max_tokens=16, temperature=0.0)["choices"][0]["text"]
    assert model.detokenize(tokens).decode(errors="ignore").startswith(" The list" + text)
    model.close()
    logits = reference(exported("hf"), torch.tensor([tokens]), q8_k)[0][0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens[len(prompt) :])[:, None])[:, 0]
    # The best of 408 logits of standard deviation 1 is about 3 above their mean; other codes move them by up to 0.1.
    assert_within(chosen, logits.amax(1), 0.2)
