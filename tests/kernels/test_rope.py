"""qkv taken apart and rotated: the definition against complex numbers, the Triton kernels against the definition."""

from __future__ import annotations

import pytest
import torch

from dqt_dist.kernels.rope import angles, split_and_rotate
from tests.kernels.runners import Runner

# Sequence, batch, groups, queries per group, width of a head. Widths that are no power of two, and one of 128.
SHAPES = [(5, 2, 2, 3, 12), (7, 3, 4, 1, 128), (4, 1, 20, 2, 64)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    s, b, groups, queries, head = shape
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(s, b, groups * (queries + 2) * head, generator=generator).to(dtype)
    # Strided, as attention's backward hands them back: [batch, heads, sequence, head] in memory.
    grads = [
        torch.randn(b, n, s, head, generator=generator).to(dtype).permute(2, 0, 1, 3)
        for n in (groups * queries, groups, groups)
    ]
    return mixed, grads


@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_is_a_complex_product(shape: tuple[int, ...]) -> None:
    s, b, groups, queries, head = shape
    mixed, _ = inputs(shape, torch.float64)
    mixed.requires_grad_()
    cos, sin = angles(s, head, 10000.0, mixed.device)
    q, k, v = split_and_rotate(mixed, groups, cos, sin)
    heads = mixed.view(s, b, groups, queries + 2, head)
    turn = torch.polar(torch.ones_like(cos, dtype=torch.float64), torch.atan2(sin.double(), cos.double()))[
        :, None, None
    ]
    for found, wanted in ((q, heads[..., :-2, :].reshape(s, b, -1, head)), (k, heads[..., -2, :])):
        turned = torch.complex(*wanted.chunk(2, dim=-1)) * turn
        # Rotated in fp32: a product, a product and a sum.
        torch.testing.assert_close(found, torch.cat([turned.real, turned.imag], -1), rtol=2.0**-20, atol=2.0**-20)
    assert torch.equal(v, heads[..., -1, :])
    # The rotation keeps lengths, so its backward is its inverse: the gradient of sum(x * x) / 2 is x itself.
    (back,) = torch.autograd.grad((q, k, v), mixed, (q.detach(), k.detach(), v.detach()))
    torch.testing.assert_close(back, mixed.detach(), rtol=2.0**-18, atol=2.0**-18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_major", [False, True], ids=["", "batch major"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_definition(run: Runner, shape: tuple[int, ...], batch_major: bool, dtype: torch.dtype) -> None:
    """The same three operations; a fused multiply-add may round one of them less."""
    mixed, grads = inputs(shape, dtype)
    cos, sin = angles(shape[0], shape[4], 10000.0, mixed.device)

    def forward_and_backward(mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *grads: torch.Tensor):
        leaf = mixed.requires_grad_()
        outputs = split_and_rotate(leaf, shape[2], cos, sin, batch_major)
        in_memory = [x.transpose(0, 1) if batch_major else x for x in outputs]
        assert all(x.is_contiguous() for x in in_memory)
        return *(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaf, grads)

    ulp = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}[dtype]
    found = run(forward_and_backward, mixed, cos, sin, *grads)
    wanted = forward_and_backward(mixed, cos, sin, *grads)
    assert len(found) == len(wanted) == 4
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=ulp, atol=2 * ulp)
