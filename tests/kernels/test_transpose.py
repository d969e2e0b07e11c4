"""Transposed e4m3 codes: the definition written out, the Triton kernel against the definition."""

from __future__ import annotations

import pytest
import torch

from dqt_dist.kernels.transpose import transpose
from tests.kernels.codes import E4M3, e4m3
from tests.kernels.runners import Runner


def test_transpose_moves_codes_and_scales_tokens() -> None:
    codes = e4m3(20, 48)
    assert torch.equal(transpose(codes).view(torch.uint8), codes.view(torch.uint8).t())
    halved = transpose(codes, torch.full((20, 1), 0.5))
    assert torch.equal(halved.float(), (codes.float() * 0.5).to(E4M3).float().t())


@pytest.mark.parametrize("shape", [(130, 200), (256, 384)])
def test_transpose_kernel_equals_definition(run: Runner, shape: tuple[int, int]) -> None:
    codes, factor = e4m3(*shape), torch.rand(shape[0], 1)
    for scale in (None, factor):
        found = run(transpose, codes, scale)
        assert torch.equal(found.view(torch.uint8), transpose(codes, scale).view(torch.uint8))
