"""Commands of a clone in which nothing is installed: they work, or say what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_coe.utils.imports import missing_package

REPO = Path(__file__).parents[2]
COMMANDS = [*sorted((REPO / "tools").glob("*.py")), REPO / "pretrain_coe.py"]
RUN = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def python(*arguments: object, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    """Python as it comes: without site-packages and without PYTHONPATH."""
    command = [sys.executable, "-E", "-S", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.stem)
def test_a_command_works_or_says_what_is_missing(command, tmp_path):
    done = python(command, "--help", cwd=tmp_path)
    if done.returncode:
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2
        assert line.startswith("error: the package ") and "pip install -e '.[data,hf,plot]'" in line
    else:
        assert done.stdout.startswith("usage: ")


def test_a_run_without_its_packages_is_answered_in_one_line(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("train: {steps: 1}\n")
    done = python(REPO / "pretrain_coe.py", "--config", config)
    assert done.returncode == 2
    assert done.stderr.startswith("pretrain_coe.py: error: the package ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("package", ["transformers", "torch"])
def test_a_package_that_a_command_imports_late_is_named(package, tmp_path):
    blocked = f"import sys; sys.modules['{package}'] = None; {RUN}"
    command = [sys.executable, "-c", blocked, REPO / "tools" / "generate.py"]
    done = subprocess.run(
        [*command, "--model", tmp_path, "--prompt", "x"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]  # transformers has its own words about torch
    assert line.startswith(f"error: the package {package} is not installed")
    assert f"`pip install {package}`" in line and "megatron-coe" not in line


def test_what_is_missing_has_the_name_that_pip_knows():
    def said(error: BaseException) -> str:
        return str(missing_package(error))

    assert "`pip install megatron-core`" in said(ModuleNotFoundError(name="megatron.core.utils"))
    assert "`pip install reasoning-gym`" in said(ModuleNotFoundError(name="reasoning_gym"))
    words = "Could not import module 'AutoTokenizer'"
    assert said(ModuleNotFoundError(words)) == words, "and not that None is missing"
    assert missing_package(ModuleNotFoundError(name="megatron_coe.gone")) is None
    assert missing_package(ImportError(name="torch")) is None
