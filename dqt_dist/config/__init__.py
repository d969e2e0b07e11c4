"""The JSON file that describes one run, and every check that can be made before a process group exists.

    schema.py   What is a field, its type, its default, its meaning? One frozen model per section.
    load.py     How does a file become a config? Overrides, messages about single fields, defaults, and text again.
    checks.py   Do the fields go together, and does a number of processes fit them?

A file has nine sections: model, quantization, optimizer, parallel, data, training, checkpoint, logging, and deepspeed,
a dictionary that DeepSpeed gets. Every problem is one line of a `UserError`:

    full.field.path: what is wrong; the numbers that disagree; what would be right

Import from here: `from dqt_dist.config import Config, load_config`. Nothing here imports torch, so a wrong config ends
a run before the seconds that torch takes.
"""

from dqt_dist.config.checks import ProcessGrid, check_world, process_grid, shown, uses_cuda_graph
from dqt_dist.config.load import SHIPPED, config_of, load_config, to_json, validated
from dqt_dist.config.schema import (
    CODES_PER_GROUP,
    DTYPE_BYTES,
    STATE_BLOCK,
    Bits,
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    FloatType,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    QuantizationConfig,
    Rounding,
    ScaleRule,
    TrainingConfig,
    ZeroOptimization,
)

__all__ = [
    "CODES_PER_GROUP",
    "DTYPE_BYTES",
    "SHIPPED",
    "STATE_BLOCK",
    "Bits",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DataSource",
    "FloatType",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProcessGrid",
    "QuantizationConfig",
    "Rounding",
    "ScaleRule",
    "TrainingConfig",
    "ZeroOptimization",
    "check_world",
    "config_of",
    "load_config",
    "process_grid",
    "shown",
    "to_json",
    "uses_cuda_graph",
    "validated",
]
