"""Format `hf`: every weight as floats, for whatever reads a LLaMA from Hugging Face.

W = scale * codes is exact in bf16 when the scale is a power of two. The weights are the trained ones.
Engines that read this format do not round activations to 8 bits.
"""

from __future__ import annotations

from dqt_dist.export import hf
from dqt_dist.export.safetensors_writer import Entry
from dqt_dist.export.weights import Weights


def entries(weights: Weights) -> list[Entry]:
    """All tensors: parameters, then `.weight` of each linear, in the export's dtype."""
    linears = [
        Entry(hf.key(name), shape, weights.dtype, lambda name=name: weights.matrix(name))
        for name, shape in weights.linears.items()
    ]
    return hf.parameter_entries(weights, list(weights.parameters)) + linears
