"""GGUF blocks: the `gguf` package unpacks them to the codes, and its own quantiser makes the same bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from dqt_dist.export.gguf_blocks import Q2_0_TYPE, TYPES, BlockType, pack, teach_gguf

teach_gguf()

SCALE = 2.0**-6
# The types that gguf 0.19's numpy code can make. It can only read the other types.
QUANTISED_BY_GGUF = ("TQ2_0", "TQ1_0", "Q8_0")


def codes_of(block: BlockType, rows: int = 6) -> np.ndarray:
    """Random codes in which every value of the type occurs."""
    generator = np.random.default_rng(0)
    codes = generator.integers(block.qmin, block.qmax + 1, (rows, 3 * block.size), dtype=np.int8)
    every = np.arange(block.qmin, block.qmax + 1, dtype=np.int8)
    codes.reshape(-1)[: len(every)] = every
    return codes


@pytest.mark.parametrize("name", TYPES)
def test_gguf_reads_the_codes_back(name: str) -> None:
    block = TYPES[name]
    codes = codes_of(block)
    found = gguf.dequantize(pack(codes, SCALE, block), gguf.GGMLQuantizationType[name])
    assert np.array_equal(found, codes * np.float32(SCALE))


@pytest.mark.parametrize("name", TYPES)
def test_sizes_are_those_of_gguf(name: str) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (TYPES[name].size, TYPES[name].num_bytes)


def test_q2_0_is_laid_out_as_llama_cpp_says() -> None:
    """By hand, as the `gguf` package has no code for it: d, then element j in byte j / 4 at bits 2 (j mod 4)."""
    codes = np.zeros((1, 64), dtype=np.int8)
    codes[0, 0], codes[0, 5], codes[0, 63] = 1, -1, 1
    found = pack(codes, 1.0, TYPES["Q2_0"])[0]
    assert found[:2].tobytes() == b"\x00\x3c"  # fp16 1.0
    assert list(found[2:4]) == [0b01010110, 0b01010001]
    assert found[17] == 0b10010101 and set(found[4:17]) == {0b01010101}
    assert gguf.GGMLQuantizationType["Q2_0"] == gguf.GGMLQuantizationType(Q2_0_TYPE) == 42


@pytest.mark.parametrize("name", QUANTISED_BY_GGUF)
def test_bytes_are_those_of_gguf_own_quantiser(name: str) -> None:
    """gguf scales by the largest weight of a block (over 127 in Q8_0): each block gets a weight of the largest code."""
    block = TYPES[name]
    codes = np.maximum(codes_of(block), -127)
    codes[:, :: block.size] = min(block.qmax, 127)
    wanted = gguf.quantize(codes * np.float32(SCALE), gguf.GGMLQuantizationType[name])
    assert np.array_equal(pack(codes, SCALE, block), wanted)


@pytest.mark.parametrize("name", TYPES)
def test_a_row_is_a_row_of_bytes(name: str) -> None:
    block = TYPES[name]
    codes = codes_of(block)
    whole = pack(codes, SCALE, block)
    assert whole.shape == (6, 3 * block.num_bytes)
    assert np.array_equal(whole[2:3], pack(codes[2:3], SCALE, block))
