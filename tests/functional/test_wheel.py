"""The wheel by itself: what is in it, and that its commands do without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_coe import __version__
from megatron_coe.cli.main import COMMANDS

REPO = Path(__file__).parents[2]
SMALL = (
    *("model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2"),
    *("model.seq_length=16", "train.steps=2", "train.global_batch_size=2"),
    *("train.micro_batch_size=2", "train.eval_samples=2"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what a checkout tracks, without a network."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("megatron_coe", "examples"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / name, folder / "source" / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPO / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run(command, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pip would put into site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def coe(installed: Path, cwd: Path, *commands: tuple) -> subprocess.CompletedProcess[str]:
    """Run commands of `coe` with the wheel's package and no other.

    In one process, which ends with the first status that is not 0: Megatron is imported once.
    """
    code = f"""
import sys
from megatron_coe.cli import main
assert main.__file__.startswith({str(installed)!r})
for arguments in {[[*map(str, arguments)] for arguments in commands]!r}:
    sys.argv = ["coe", *arguments]
    if status := main.main():
        sys.exit(status)
"""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_it_holds_the_package_its_presets_and_the_license(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    presets = {
        f"megatron_coe/presets/{path.relative_to(REPO / 'examples')}"
        for folder in ("", "paper", "scale", "compare")
        for path in (REPO / "examples" / folder).glob("*.yaml")
    }
    assert presets <= names and len(presets) > 40
    assert "megatron_coe/analysis/report.html" in names
    assert f"megatron_coe-{__version__}.dist-info/licenses/LICENSE" in names
    roots = {name.split("/")[0] for name in names}
    assert roots == {"megatron_coe", f"megatron_coe-{__version__}.dist-info"}
    modules = {f"megatron_coe/cli/{name.replace('-', '_')}.py" for name in COMMANDS}
    assert modules <= names


def test_vllm_finds_the_plugin_and_its_function(installed: Path, tmp_path: Path) -> None:
    """Without vLLM, whose every process loads what the entry point names."""
    code = f"""
import sys
sys.path.insert(0, {str(installed)!r})
from importlib.metadata import distribution
points = distribution("megatron_coe").entry_points.select(group="vllm.general_plugins")
(point,) = [each for each in points if each.name == "megatron_coe"]
assert point.load().__name__ == "register"
assert "torch" not in sys.modules and "megatron" not in sys.modules
"""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_says_how_it_is_called(installed: Path, tmp_path: Path) -> None:
    """In one process: that they can be imported is what the checkout could hide."""
    code = f"""
import sys
sys.path.insert(0, {str(installed)!r})
from megatron_coe.cli import main
for name in main.COMMANDS:
    sys.argv = ["coe", name, "--help"]
    try:
        main.main()
    except SystemExit as end:
        assert end.code == 0
assert main.__file__.startswith({str(installed)!r})
assert "torch" not in sys.modules, "slow to import"
"""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: coe ") == len(COMMANDS)


def test_it_trains_converts_and_generates(installed: Path, tmp_path: Path) -> None:
    """The whole way in an empty folder, the presets by their names."""
    (tmp_path / "text.txt").write_text("".join(f"{n} + {n} = {2 * n}\n" for n in range(400)))
    data = ("data.tokenizer=t.model", "data.train=[t_text_document]")
    data += ("data.valid=[t_text_document]", "log.dir=run")
    done = coe(
        installed,
        tmp_path,
        ("train-tokenizer", "--input", "text.txt", "--output", "t.model", "--vocab-size", 274),
        ("preprocess", "--input", "text.txt", "--tokenizer", "t.model", "--output-prefix", "t"),
        ("train", "--config", "quickstart", *SMALL, *data),
        ("convert", "to-hf", "--input", "run/checkpoints", "--output", "hf"),
        ("generate", "--model", "hf", "--prompt", "2 + 2", "--max-new-tokens", 2),
        ("estimate", "--config", "paper/coe-2_4-64"),
    )
    assert done.returncode == 0, done.stderr
    assert "\nstep 2/2 | loss " in done.stdout
    generated = done.stdout.partition("run/checkpoints/step_00000002 -> hf\n")[2]
    assert generated.startswith("2 + 2")
    assert "780,930,048" in generated, "the model of the paper has its size"


def test_a_preset_that_there_is_not(installed: Path, tmp_path: Path) -> None:
    done = coe(installed, tmp_path, ("estimate", "--config", "paper/coe-2_4-46"))
    assert done.returncode == 2 and "did you mean the preset 'paper/coe-2_4-64'" in done.stderr
