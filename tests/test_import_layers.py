"""Imports go down only, so each folder can be read without the folders above it.

    errors < json_files < folder_lock < progress_line < command_line < config < launch, dtypes < lowbit < plan < kernels
           < parallel < layers < optim < data < checkpoint < training < export < inference < commands

The order is checked on the source text. Every import statement counts, also inside functions and under TYPE_CHECKING,
and relative imports too. launchers/ and tools/ are on top and may import anything of the package. Nothing in the
package imports launchers/ or tools/.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "dqt_dist"
ORDER = [
    "errors",
    "json_files",
    "folder_lock",
    "progress_line",
    "command_line",
    "config",
    "launch",
    "dtypes",
    "lowbit",
    "plan",
    "kernels",
    "parallel",
    "layers",
]
ORDER += ["optim", "data", "checkpoint", "training", "export", "inference", "commands"]
ON_TOP = ("launchers", "tools", "tests", "benchmarks")
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))


def imported(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, full name) of every import in `source`. `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def layer_of(module: str) -> str | None:
    """The second part of a name within the package. None for other packages and for the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One text per import of `module` that goes up or to the top."""
    own, found = layer_of(module), []
    for line, name in imported(source, module, is_package):
        other = layer_of(name)
        if name.split(".")[0] in ON_TOP:
            found.append(f"{module}:{line} imports {name}, which stands on top of the package")
        elif other in ORDER and (own is None or ORDER.index(other) > ORDER.index(own)):
            found.append(f"{module}:{line} imports {name}: {other} is above {own or 'the package itself'}")
    return sorted(set(found))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_module_belongs_to_a_layer() -> None:
    assert len(MODULES) > 20
    assert {layer_of(module_name(path)) for path in MODULES} <= {*ORDER, None}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize("path", [p for p in MODULES if "lowbit" in p.parts], ids=module_name)
def test_lowbit_is_plain_torch(path: Path) -> None:
    """lowbit/ uses no process group, no Megatron and no DeepSpeed. The layout of a rank is data that it is given."""
    names = [name for _, name in imported(path.read_text(encoding="utf-8"), module_name(path))]
    wrong = ("torch.distributed", "megatron", "deepspeed")
    assert [name for name in names if any(name == w or name.startswith(w + ".") for w in wrong)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import dqt_dist.training.loop",
        "from dqt_dist.training import loop",
        "from dqt_dist import training",
        "from ..training import loop",
        "from .. import training",
        "def f():\n    from dqt_dist.optim.adamw import adamw_direction",
        "if TYPE_CHECKING:\n    import dqt_dist.checkpoint.store as store",
        "import tools.prepare_data",
    ],
)
def test_the_check_sees_every_form_of_import_that_goes_up(source: str) -> None:
    """Control: each of these imports is found in a module of layers."""
    assert len(violations(source, "dqt_dist.layers.norm")) >= 1


@pytest.mark.parametrize(
    "source",
    ["import torch", "from dqt_dist.lowbit.grid import Grid", "from . import norm", "from ..lowbit import grid"],
)
def test_the_check_allows_what_goes_down_or_stays(source: str) -> None:
    assert violations(source, "dqt_dist.layers.attention") == []
