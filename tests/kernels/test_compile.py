"""Every kernel is compiled without a GPU, with the arguments that the configs give it.

Triton brings ptxas, so a cubin needs no GPU. What is compiled follows from configs/*.json through `launches.py`.
VARIANTS are choices that lead to other machine code and that no file of configs/ makes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from dqt_dist.config import load_config
from tests.kernels.launches import Launch, Specialised, distinct, launches_of, triton_modules

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.json"))
# Overrides of 130m_pure_ternary.json. The last one has rows that fill no block.
VARIANTS = [
    ("optimizer.name=adafactor",),
    ("optimizer.name=adafactor", "quantization.bits=4"),
    ("optimizer.name=adafactor", "quantization.bits=6"),
    ("optimizer.name=adafactor", "quantization.bits=6", "model.ffn_hidden_size=2052"),
    ("optimizer.name=adafactor", "quantization.bits=8"),
    ("quantization.bits=4",),
    ("quantization.bits=6",),
    ("quantization.bits=6", "model.ffn_hidden_size=2052"),
    ("quantization.latent_bits=4", "optimizer.state_bits=8"),
    ("optimizer.second_moment=factored",),
    ("optimizer.second_moment=factored", "optimizer.state_bits=8", "optimizer.gradient_dtype=bf16"),
    ("quantization.latent_bits=6", "optimizer.name=adafactor"),
    ("quantization.latent_bits=8", "quantization.bits=4"),
    ("optimizer.state_bits=8",),
    ("optimizer.low_bit_weight_decay=0.1",),
    ("optimizer.fused_backward=true", "optimizer.max_grad_norm=0", "optimizer.gradient_dtype=bf16"),
    ("quantization.rounding=nearest",),
    ("quantization.compute=int8",),
    ("quantization.compute=fp8", "quantization.weight_gradient=bf16"),
    ("quantization.compute=fp8", "model.ffn_hidden_size=2064"),
]


@lru_cache(maxsize=1)
def launches() -> tuple[Launch, ...]:
    """Every distinct launch of the configs and the variants."""
    configs = [load_config(path) for path in CONFIGS]
    configs += [load_config(CONFIGS[0].with_name("130m_pure_ternary.json"), overrides) for overrides in VARIANTS]
    return tuple(dict.fromkeys(one for config in configs for one in launches_of(config)))


def uses_e4m3(one: Specialised) -> bool:
    """Whether a kernel converts to or from e4m3, which Triton supports from sm_89 on."""
    constants = {one.source.fn.arg_names[path[0]]: value for path, value in one.source.constants.items()}
    return "*fp8e4nv" in one.source.signature.values() or constants.get("STATE_BITS") == 8


def representatives(specialised: list[Specialised]) -> Iterator[Specialised]:
    """One of each kernel, of each set of dtypes and of each set of flags, whatever its sizes."""
    seen = set()
    for one in specialised:
        flags = tuple(value for value in one.source.constants.values() if isinstance(value, bool))
        key = (one.source.fn, tuple(one.source.signature.values()), flags)
        if key not in seen:
            seen.add(key)
            yield one


def failures(specialised: list[Specialised]) -> dict[str, str]:
    """The compiler's message for each kernel that it refuses, by the kernel's name and constants."""
    found = {}
    for one in specialised:
        try:
            assert one.compiled().asm["cubin"], "no machine code"
        except Exception as error:  # the compiler has no common class of errors
            found[one.name] = str(error).strip()[-400:]
    return found


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Triton compile. With its usual cache it would take machine code of an earlier run."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_the_configs_launch_every_kernel() -> None:
    """Otherwise some kernel would never be compiled. Control: the kernels of one config are not all kernels."""
    kernels = {
        value
        for module in triton_modules()
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, JITFunction)
    }
    assert {one.kernel for one in launches()} == kernels
    assert {one.kernel for one in launches_of(load_config(CONFIGS[0]))} < kernels


@pytest.mark.slow
def test_every_launch_compiles_for_sm_90() -> None:
    """H100 and H200: every combination of constants, dtypes and divisibility."""
    assert failures(distinct(launches(), 90)) == {}


@pytest.mark.slow
def test_every_kernel_compiles_for_sm_100() -> None:
    """B200: `representatives`, to save time."""
    assert failures(list(representatives(distinct(launches(), 100)))) == {}


@pytest.mark.slow
def test_every_kernel_compiles_for_sm_80_but_those_with_e4m3() -> None:
    """A100: `representatives`. The compiler refuses exactly the kernels with e4m3: fp8 operands, and 8-bit moments."""
    chosen = list(representatives(distinct(launches(), 80)))
    assert failures([one for one in chosen if not uses_e4m3(one)]) == {}
    refused = failures([one for one in chosen if uses_e4m3(one)])
    assert {name.split("(")[0] for name in refused} == {
        "_adamw_kernel",
        "_quantize_kernel",
        "_scaled_kernel",
        "_swiglu_backward_kernel",
        "_transpose_kernel",
        "_unpack_kernel",
    }
    assert len(refused) == sum(uses_e4m3(one) for one in chosen), "Triton compiles some for sm_80 now: drop them here"


def test_the_check_sees_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a size that is no power of two is refused, and the kernel is named."""
    good = next(one for one in launches() if one.kernel.fn.__name__ == "_square_sum_kernel")
    bad = Launch(good.kernel, good.args, tuple((k, 4095 if k == "BLOCK" else v) for k, v in good.constants))
    (name,) = failures(distinct([bad], 90))
    assert name.startswith("_square_sum_kernel(")


PRIVATE = (
    "kernels/launch.py calls Triton's private launcher, and this Triton has changed it: {}. Read JITFunction.run in "
    "triton/runtime/jit.py, let `launch` make the same call, then raise the bound on triton in pyproject.toml. Until "
    "then keep the old bound, or let `launch` always take Triton's own way: kernel[grid](*args, **constants)."
)


def test_what_launch_reads_of_triton_is_still_there() -> None:
    """`launch` makes the call that JITFunction.run makes.

    Without a GPU the call itself is impossible, so the source of JITFunction.run is searched for it.
    """
    one = next(one for one in launches() if one.kernel.fn.__name__ == "_update_kernel")
    kernel, compiled = one.kernel, distinct([one], 90)[0].compiled()
    source = " ".join(inspect.getsource(JITFunction.run).split())
    call = (
        "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
        "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
    )
    assert call in source, PRIVATE.format("JITFunction.run calls the kernel in another way")
    for name in ("run", "function", "packed_metadata"):
        known = hasattr(CompiledKernel, name) or name in vars(compiled)
        assert known, PRIVATE.format(f"CompiledKernel has no attribute {name!r}")
    assert kernel.arg_names[: len(one.args)] == [p.name for p in kernel.params if not p.is_constexpr], PRIVATE.format(
        "arg_names are no longer in the order of the parameters"
    )
    unspecialised = {p.name for p in kernel.params if p.do_not_specialize}
    assert unspecialised == {"key", "step"}, PRIVATE.format("params[].do_not_specialize has another meaning")
