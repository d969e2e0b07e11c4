"""Cross-entropy in parts of the vocabulary: against torch's in fp64, and the Triton kernels against the definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dqt_dist.kernels.cross_entropy import gradient_, statistics
from tests.kernels.runners import INTERPRETED, Runner

# Tokens beyond one chunk of the CPU form, vocabularies that fill no block.
SHAPES = [(5, 13), (7, 5001)] if INTERPRETED else [(5, 13), (300, 2048), (7, 5001)]


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(shape, generator=generator) * 5).to(dtype)
    return logits, torch.randint(shape[1], (shape[0],), generator=generator), torch.rand(shape[0], generator=generator)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_of_the_vocabulary_make_torchs_loss_and_gradient(shape: tuple[int, int], parts: int) -> None:
    logits, labels, grad = inputs(shape, torch.float32)
    exact = logits.double().requires_grad_()
    wanted = functional.cross_entropy(exact, labels, reduction="none")
    (wanted_gradient,) = torch.autograd.grad(wanted, exact, grad.double())
    pieces = [piece.contiguous() for piece in logits.tensor_split(parts, dim=1)]
    firsts = [sum(piece.shape[1] for piece in pieces[:i]) for i in range(parts)]
    found = [statistics(piece, labels - first) for piece, first in zip(pieces, firsts, strict=True)]
    largest = torch.stack([m for m, _, _ in found]).amax(dim=0)
    log_sum = largest + torch.log(sum(z * torch.exp(m - largest) for m, z, _ in found))
    # fp32: exp of up to 5001 terms, each a few ulps off, and one subtraction of numbers around 20.
    torch.testing.assert_close((log_sum - sum(own for _, _, own in found)).double(), wanted, rtol=1e-6, atol=1e-5)
    gradients = [gradient_(piece, labels - first, log_sum, grad) for piece, first in zip(pieces, firsts, strict=True)]
    torch.testing.assert_close(torch.cat(gradients, dim=1).double(), wanted_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_definition(run: Runner, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Sums in another order; labels of other ranks lie outside on either side."""
    logits, labels, grad = inputs(shape, dtype)
    for first in (0, 3, -4):
        found = run(statistics, logits, labels - first)
        wanted = statistics(logits, labels - first)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[2], wanted[2])
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=0)
        log_sum = wanted[0] + torch.log(wanted[1])
        a = run(gradient_, logits, labels - first, log_sum, grad)
        b = gradient_(logits.clone(), labels - first, log_sum, grad)
        ulp = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}[dtype]
        torch.testing.assert_close(a, b, rtol=ulp, atol=1e-6)
