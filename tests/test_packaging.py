"""The wheel: what a user gets by pip, without a clone. Every command answers from another folder, by its own name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from dqt_dist import command_line

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SCRIPTS = sorted({*(ROOT / "launchers").rglob("*.py"), *(ROOT / "tools").glob("*.py")})
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")

SCRIPT = '''\
#!/usr/bin/env python3
"""{command} in a clone that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[{depth}]))

from dqt_dist.commands.{module} import main

if __name__ == "__main__":
    sys.exit(main())
'''


@dataclass(frozen=True)
class Installed:
    """The wheel, and a folder outside the repository where it is installed."""

    wheel: Path
    folder: Path

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(self.folder)}
        environment.pop("RANK", None)
        program = [sys.executable, str(self.folder / "bin" / command), *arguments]
        return subprocess.run(program, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Built from a copy, because a build leaves folders beside its source. No network: what it needs is here."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "dqt_dist", source / "dqt_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheels, folder = source / "wheels", tmp_path_factory.mktemp("installed")
    build = ("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(wheels), str(source))
    subprocess.run([*PIP, *build], check=True, timeout=300)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run(
        [*PIP, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)], check=True, timeout=300
    )
    return Installed(wheel, folder)


def test_the_wheel_holds_the_package_its_configs_and_its_license(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "dqt_dist").rglob("*.py")}
    files |= {f"dqt_dist/config/shipped/{path.name}" for path in (ROOT / "configs").glob("*.json")}
    assert {name for name in names if ".dist-info/" not in name} == files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_installed_command(command: str, installed: Installed) -> None:
    done = installed.run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {command} [-h]")
    assert f"{command} --" in done.stdout.split("\n\n", 1)[1] or f"{command} runs/" in done.stdout


def test_an_installed_command_works_outside_the_repository(installed: Installed, tmp_path: Path) -> None:
    """With a config that came with it: the working folder has none."""
    done = installed.run("dqt-pretrain", "--config", "configs/130m_ternary.json", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "") and "84,934,656 weights" in done.stdout
    imported = "import dqt_dist.commands.pretrain as module; print(module.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", imported],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed.folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(installed.folder)  # and not that of the clone


def test_installed_commands_name_installed_commands(installed: Installed) -> None:
    """In help and messages, where a script of the clone names scripts of the clone."""
    missing = "1b_ternary.json: cannot be read: No such file or directory; a config is a JSON object as those in "
    shipped = installed.folder / "dqt_dist/config/shipped"
    for program, folder, prepare in (
        (installed.folder / "bin/dqt-pretrain", shipped, "dqt-prepare-data --input"),
        (ROOT / "launchers/pretrain.py", ROOT / "configs", "tools/prepare_data.py --input"),
    ):
        look = ("--dry-run", "--check-files")
        said = installed.run(str(program), "--config", "configs/1b_ternary.json", *look).stderr
        assert said.startswith("error: data.tokenizer: data/corpus/tokenizer.model does not exist; ")
        assert said.endswith(f"{prepare} python-docs --vocab-size 32000 --output data/corpus\n")
        assert installed.run(str(program), "--config", "1b_ternary.json").stderr == f"error: {missing}{folder}\n"
        help_text = installed.run(str(program), "--help").stdout
        assert ("launchers/" in help_text) == (folder != shipped)
    said = installed.run("dqt-evaluate", "--checkpoint", "nowhere", "--data", "book.txt").stderr
    assert said.startswith("dqt-evaluate: nowhere: ")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_the_call_of_a_command_and_nothing_else(script: Path) -> None:
    commands = {module: command for command, module in COMMANDS.items()}
    command = commands[f"dqt_dist.commands.{script.stem}:main"]
    depth = len(script.relative_to(ROOT).parents) - 1
    assert script.read_text() == SCRIPT.format(command=command, module=script.stem, depth=depth)
    assert os.access(script, os.X_OK)


def test_every_command_has_its_script() -> None:
    assert set(COMMANDS.values()) == {f"dqt_dist.commands.{path.stem}:main" for path in SCRIPTS}
    modules = {
        command: f"dqt_dist.commands.{Path(script).stem}:main" for command, script in command_line.SCRIPTS.items()
    }
    assert modules == COMMANDS and {str(path.relative_to(ROOT)) for path in SCRIPTS} == {*command_line.SCRIPTS.values()}
