"""Which kernels a config launches, found by running one step's operations on tensors that have a shape but no memory.

    config  ->  layers and optimizer calls on fake CUDA tensors  ->  Launch: kernel, arguments, constants

torch's FakeTensorMode propagates device, dtype and shape without a device. `recorded` replaces `launch` in every
`*_triton` module, so the arguments are those that a training step on one GPU passes. Nothing about a kernel is written
down a second time here. `specialised` and `compiled` then do what Triton's own launch does before it calls the driver.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

import dqt_dist.kernels
from dqt_dist.config import Config
from dqt_dist.dtypes import TORCH_DTYPES
from dqt_dist.kernels import cross_entropy, quantize, rope, scaled_matmul
from dqt_dist.kernels.exact_square_sums import exact_square_sums
from dqt_dist.kernels.low_bit_update import AdamW, update_rows
from dqt_dist.kernels.mean import mean_of_parts
from dqt_dist.kernels.square_sum import square_sum
from dqt_dist.layers import compute, low_bit_feed_forward, low_bit_linear
from dqt_dist.layers.low_bit_feed_forward import LowBitFeedForward
from dqt_dist.layers.low_bit_linear import NormColumnParallelLowBitLinear, RowParallelLowBitLinear
from dqt_dist.lowbit import coordinates
from dqt_dist.lowbit.activation import ACTIVATION_CODES
from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.packing import new_packed
from dqt_dist.lowbit.update import RoundingKey
from dqt_dist.optim.adamw import adamw_update_rows, new_moments

CUDA = torch.device("cuda")
# What an H100 and an H200 have.
NUM_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Pointer:
    """What Triton specialises a tensor on: its dtype and whether its address is a multiple of 16."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Launch:
    """One kernel launch. args: pointers, numbers and None. constants: constexpr parameters and launch options."""

    kernel: Any
    args: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]


def triton_modules() -> list[Any]:
    """Every module of dqt_dist.kernels that launches Triton kernels."""
    names = sorted(path.stem for path in Path(dqt_dist.kernels.__path__[0]).glob("*_triton.py"))
    return [importlib.import_module(f"dqt_dist.kernels.{name}") for name in names]


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects launches instead of doing them; tensors made inside are fake."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        launches.append(Launch(kernel, tuple(_without_memory(arg) for arg in args), tuple(constants.items())))

    properties = SimpleNamespace(multi_processor_count=NUM_MULTIPROCESSORS)
    # These functions keep tensors for later calls. Fake tensors must not outlive this block.
    caches = (coordinates.row_words, rope.angles, scaled_matmul.ones)
    with contextlib.ExitStack() as stack:
        for module in triton_modules():
            stack.enter_context(mock.patch.object(module, "launch", record))
        stack.enter_context(mock.patch("torch.cuda.current_device", lambda: CUDA))
        stack.enter_context(mock.patch("torch.cuda.get_device_properties", lambda _: properties))
        stack.enter_context(
            mock.patch.object(low_bit_feed_forward.parallel_state, "get_tensor_model_parallel_group", lambda: OneRank())
        )
        # These are torch's own products with `out=`. Fake tensors have none for a device that this torch is
        # not built for.
        stack.enter_context(mock.patch.object(compute, "add_weight_gradient", lambda *_: None))
        for cache in caches:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        stack.enter_context(mock.patch.object(FakeTensor, "__getitem__", _get_item))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.no_grad())
        yield launches


def _get_item(x: Tensor, index: Any) -> Tensor:
    """x[index], where each part of index is a slice, an integer, None or a tensor.

    torch's own indexing asks for the driver of the device.
    """
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, int):
            x = torch.select(x, dim, part)
            continue
        if isinstance(part, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1)
        elif part is None:
            x = torch.unsqueeze(x, dim)
        else:
            x = torch.index_select(x, dim, part)
        dim += 1
    return x


class OneRank:
    """A tensor-parallel group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class AutogradStep:
    """Calls forward and backward of an autograd function directly.

    Autograd's graph needs a torch that is built for the device of the tensors.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def forward(self, *args: Any) -> Any:
        return self.function.forward(self, *args)

    def backward(self, *grads: Any) -> Any:
        return self.function.backward(self, *grads)


def _forward_and_backward(function: Any, *args: Any) -> Tensor:
    """In place of `apply_function` of the low-bit layers."""
    step = AutogradStep(function)
    y = step.forward(*args)
    step.backward(torch.empty_like(y))
    return y


def _without_memory(arg: Any) -> Any:
    return Pointer(arg.dtype, arg.storage_offset() * arg.itemsize) if isinstance(arg, Tensor) else arg


# ---- one step of a config ----


def launches_of(config: Config) -> list[Launch]:
    """Every distinct launch of one training step of `config` on one GPU."""
    with recorded() as launches:
        _attention_and_loss(config)
        if config.quantization.method == "dqt":
            _layers(config)
            for rows, columns in _linear_shapes(config):
                _update(config, rows, columns)
    return list(dict.fromkeys(launches))


def _linear_shapes(config: Config) -> list[tuple[int, int]]:
    """[rows, columns] of qkv, o, gate|up and down."""
    model = config.model
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    return [(_qkv_width(config), hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn)]


def _qkv_width(config: Config) -> int:
    """Width of queries, keys and values of one token."""
    return config.model.hidden_size + 2 * config.model.kv_hidden_size


def _attention_and_loss(config: Config) -> None:
    """The rotary embedding and the loss, forward and backward, and the sum of squares of a gradient."""
    model, dtype = config.model, TORCH_DTYPES[config.quantization.dtype]
    s, b, head = model.seq_length, config.training.micro_batch_size, model.head_dim
    cos, sin = rope.angles(s, head, model.rope_base, CUDA)
    mixed = torch.empty(s, b, _qkv_width(config), dtype=dtype, device=CUDA)
    rotation = AutogradStep(rope._SplitAndRotate)
    outputs = rotation.forward(mixed, model.num_query_groups, cos, sin, False)
    # Attention hands its gradients back as [batch, heads, sequence, head] in memory.
    rotation.backward(
        *(torch.empty(b, x.shape[2], s, head, dtype=dtype, device=CUDA).permute(2, 0, 1, 3) for x in outputs)
    )
    logits = torch.empty(s * b, model.vocab_size, dtype=dtype, device=CUDA)
    labels = torch.empty(s * b, dtype=torch.int64, device=CUDA)
    largest, sum_exp, _ = cross_entropy.statistics(logits, labels)
    cross_entropy.gradient_(logits, labels, largest + torch.log(sum_exp), torch.empty(s * b, device=CUDA))
    gradient_dtype = TORCH_DTYPES[config.optimizer.gradient_dtype]
    square_sum(torch.empty(model.hidden_size, dtype=gradient_dtype, device=CUDA))
    mean_of_parts(torch.empty(2, model.hidden_size, dtype=gradient_dtype, device=CUDA))


def _layers(config: Config) -> None:
    """Forward and backward of the low-bit linears around attention, and of the feed-forward half."""
    model, dtype, group = config.model, TORCH_DTYPES[config.quantization.dtype], OneRank()
    layer_config: Any = SimpleNamespace(
        quantization=config.quantization,
        sequence_parallel=False,
        use_cpu_initialization=False,
        layernorm_epsilon=1e-5,
        params_dtype=dtype,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
    )
    (qkv_rows, hidden), *_ = _linear_shapes(config)
    arguments: dict[str, Any] = {"config": layer_config, "tp_group": group}
    with CUDA:
        layers = [
            NormColumnParallelLowBitLinear(hidden, qkv_rows, **arguments),
            RowParallelLowBitLinear(hidden, hidden, **arguments),
            LowBitFeedForward(layer_config),
        ]
    tokens = (model.seq_length, config.training.micro_batch_size)
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, LowBitMatrix):
                module.assign(_layout(module.rows, module.columns))
                module.gradient.dtype = TORCH_DTYPES[config.optimizer.gradient_dtype]
        with (
            mock.patch.object(low_bit_linear, "apply_function", _forward_and_backward),
            mock.patch.object(low_bit_feed_forward, "apply_function", _forward_and_backward),
        ):
            layer(torch.empty(*tokens, hidden, dtype=dtype, device=CUDA))
    if config.quantization.activation != "none":
        # What only a group of several tensor-parallel ranks asks for.
        gate_up = torch.empty(tokens[0] * tokens[1], 2 * model.ffn_hidden_size, dtype=dtype, device=CUDA)
        operand_dtype = ACTIVATION_CODES[config.quantization.activation]
        assert operand_dtype is not None
        quantize.swiglu_scale(gate_up, operand_dtype)
        quantize.operand_scale(gate_up[:, :hidden], operand_dtype)


def _layout(rows: int, columns: int) -> ShardLayout:
    return ShardLayout((LogicalMatrix("a", rows, columns),), (RowBlock(0, 0, rows),), columns)


def _update(config: Config, rows: int, columns: int) -> None:
    """The update of one matrix, with the step and the seed that a run begins with."""
    optimizer = config.optimizer
    weight = LowBitMatrix.of(config.quantization, rows, columns, CUDA)
    weight.assign(_layout(rows, columns))
    latents = None
    if weight.latent_grid is not None:
        latents = new_packed(rows, columns, weight.latent_grid, CUDA)
    key = RoundingKey(config.training.seed, 1, config.quantization.rounding)
    if optimizer.name == "adafactor":
        direction = torch.empty(rows, columns, device=CUDA)
        update_rows(weight, direction, 0, 1e-3, optimizer.low_bit_weight_decay, key, latents)
        return
    assert optimizer.low_bit_beta1 is not None
    rule = AdamW(optimizer.low_bit_beta1, optimizer.beta2, optimizer.epsilon, optimizer.low_bit_weight_decay)
    gradient = torch.empty(rows, columns, dtype=TORCH_DTYPES[optimizer.gradient_dtype], device=CUDA)
    factored = optimizer.second_moment == "factored"
    moments = new_moments(rows, columns, optimizer.state_bits, CUDA, second=not factored)
    if factored:
        moments |= {"row_factor": torch.empty(rows, device=CUDA), "column_mean": torch.empty(1, columns, device=CUDA)}
        exact_square_sums(gradient, torch.empty((), device=CUDA), weight.row_matrix, 1)
    if latents is not None:
        moments["latent"] = latents
    clip = None if optimizer.fused_backward else torch.empty((), device=CUDA)
    adamw_update_rows(weight, gradient, moments, 0, clip, 1e-3, rule, key)


# ---- compilation without a device ----


@dataclass(frozen=True)
class Specialised:
    """A launch as Triton's compiler takes it. Two launches with one `key` run the same machine code."""

    source: Any
    options: Any
    target: Any

    @property
    def key(self) -> str:
        s = self.source
        return repr((s.fn.fn.__qualname__, s.signature, s.constants, s.attrs, self.options, self.target))

    @property
    def name(self) -> str:
        """The kernel with the type or the value of each argument, for messages."""
        names = list(self.source.signature)
        values = {names[path[0]]: repr(getattr(value, "value", value)) for path, value in self.source.constants.items()}
        arguments = (f"{name}: {values.get(name, dtype)}" for name, dtype in self.source.signature.items())
        return f"{self.source.fn.fn.__qualname__}({', '.join(arguments)})"

    def compiled(self) -> Any:
        """triton.compiler.CompiledKernel; never loaded onto a device."""
        import triton

        return triton.compile(self.source, target=self.target, options=self.options.__dict__)


def specialised(launch: Launch, capability: int) -> Specialised:
    """As JITFunction.run does for arguments on a device of compute capability `capability` (90 is 9.0)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    kernel, constants = launch.kernel, {**dict(launch.constants), "debug": False, "instrumentation_mode": ""}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **constants)
    options, signature, constexprs, attributes = kernel._pack_args(backend, constants, bound, specialization, options)
    return Specialised(ASTSource(kernel, signature, constexprs, attributes), options, target)


def distinct(launches: list[Launch], capability: int) -> list[Specialised]:
    """One of each key, in order."""
    found = {s.key: s for s in (specialised(launch, capability) for launch in launches)}
    return list(found.values())
