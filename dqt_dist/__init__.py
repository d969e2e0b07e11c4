"""dqt_dist: distributed pre-training of LLaMA models whose linear weights exist only as low-bit integers."""

import warnings

__version__ = "0.1.0"

MEGATRON_NOTES = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed. Falling back to Torch Norm",
    r"The following imports from `dynamic_context\.py`",
    r"`torch\.jit\.script(_method)?` is deprecated",
    "full scope is deprecated. Use empty cuda_graph_scope",
    # Both megatron-core and DeepSpeed still call these under torch 2.13.
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    "When using .* it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
)
"""Regular expressions of the warnings that megatron-core gives where Transformer Engine and Apex are absent.

The two packages are optional and this project needs neither. Other warnings stay. tests/conftest.py uses this list.
"""
for _note in MEGATRON_NOTES:
    warnings.filterwarnings("ignore", message=_note)
