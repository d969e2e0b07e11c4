"""Internals of DeepSpeed in use: each is listed, exists in the installed version, and is reported if missing."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest

from dqt_dist.config.checks import REDUCTION_KEYS, ZERO_KEYS
from dqt_dist.errors import RunError
from dqt_dist.optim import deepspeed_adapter
from dqt_dist.optim.deepspeed_adapter import INTERNALS, MasterShard, require_internals
from dqt_dist.optim.engine import CombinedOptimizer
from tests.distributed import run_distributed
from tests.parallel.runs import start

PACKAGE = Path(deepspeed_adapter.__file__).parents[1]


def zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


def used_of(source: str, holder: str) -> set[str]:
    """Attributes read or written in `source` as <holder>.<name>, where holder is `inner` or `self.inner`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (holder, f"self.{holder}"):
            found.add(node.attr)
    return found


def test_every_internal_in_use_is_named() -> None:
    """`step` and `zero_grad` are not listed, because they are torch's interface of an optimizer."""
    named = {name for names in INTERNALS.values() for name in names} | set(deepspeed_adapter.BF16_STAGE_0_INTERNALS)
    assert used_of(inspect.getsource(deepspeed_adapter), "inner") - {"step", "zero_grad"} == named
    assert used_of(inspect.getsource(deepspeed_adapter), "engine") == set(deepspeed_adapter.ENGINE_INTERNALS) - {
        "optimizer"
    }


def test_no_other_file_knows_them() -> None:
    names = {name for names in INTERNALS.values() for name in names} - {"averaged_gradients"}
    for path in PACKAGE.rglob("*.py"):
        if path.name != "deepspeed_adapter.py":
            words = set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
            assert not words & names, path
            assert not re.search(r"^\s*(import|from) deepspeed", path.read_text(encoding="utf-8"), re.MULTILINE), path


def internals_are_there(rank: int, world_size: int, *overrides: str) -> int:
    """Builds the real optimizer of a stage, which checks its internals, steps and loads. Returns the number checked."""
    run = start(*overrides)
    run.step(1)
    run.optimizer.state_was_loaded(1)
    run.step(2)
    return len(INTERNALS[run.config.zero_stage])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_the_installed_deepspeed_has_them(stage: int, compute: str) -> None:
    found = run_distributed(internals_are_there, 1, zero(stage), f"quantization.compute={compute}")[0]
    assert found == len(INTERNALS[stage])


def test_a_deepspeed_without_one_is_refused_with_a_sentence() -> None:
    inner = SimpleNamespace(**dict.fromkeys(INTERNALS[1]))
    require_internals(inner, INTERNALS[1])
    del inner.update_lp_params
    with pytest.raises(RunError, match=f"DeepSpeed {deepspeed.__version__}.*has no update_lp_params.*pyproject.toml"):
        require_internals(inner, INTERNALS[1])


def asked_by_the_engine() -> set[str]:
    """Attributes that DeepSpeed's engine reads of its optimizer, in the methods that a step calls."""
    engine = deepspeed.DeepSpeedEngine
    sources = [
        inspect.getsource(engine.step),
        inspect.getsource(engine._take_model_step),
        inspect.getsource(engine.get_lr),
    ]
    return set(re.findall(r"self\.optimizer\.(\w+)", "\n".join(sources)))


def test_the_optimizer_answers_what_the_engine_asks() -> None:
    """CombinedOptimizer forwards nothing. What a new DeepSpeed reads is added, or listed here with a reason."""
    not_asked = {
        "_global_grad_norm",  # read only after hasattr; CombinedOptimizer computes the norm
        "_sync_selective_optimizer_lr",  # ZenFlow only, which the config refuses
    }
    unanswered = {name for name in asked_by_the_engine() - not_asked if not hasattr(CombinedOptimizer, name)}
    assert unanswered == set(), f"DeepSpeed {deepspeed.__version__} asks an optimizer for {sorted(unanswered)}"
    assert not hasattr(CombinedOptimizer, "__getattr__")


def test_a_shard_is_a_range_of_its_master() -> None:
    import torch

    master = torch.arange(12.0).view(3, 4)
    shard = MasterShard(SimpleNamespace(), [], 2, 3, master, 5)  # type: ignore[arg-type]
    assert shard.view(master).tolist() == [5.0, 6.0, 7.0]


def test_the_keys_that_are_handed_on_are_keys_of_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert {*ZERO_KEYS, *REDUCTION_KEYS} <= known
