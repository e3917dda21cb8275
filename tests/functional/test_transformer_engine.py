"""Commands where Transformer Engine is installed and cannot be used: no GPU, or it is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional.test_pretrain import REPO, config, data, environment  # noqa: F401
from tests.stub_te import BROKEN, NEEDS_A_GPU, write_te

CALLS = """
import pretrain_coe
from megatron_coe.distributed import train_state

def main(*arguments):
    print("status", pretrain_coe.main(["--config", {config!r}, *arguments]), flush=True)

main("train.exit_step=1")
main("train.exit_step=2")
def refuse(*_):
    raise AssertionError("an optimizer is built")
train_state.build_optimizer = refuse
main("--eval-only")
main("--dry-run")
main("model.backend=te")
main("model.fp8=hybrid")
"""

IMPORTING = {
    "pretrain_coe.py": ["--config", "{config}"],
    "tools/benchmark.py": ["--what", "experts"],
    "tools/convert_checkpoint.py": ["to-hf", "--input", "{run}", "--output", "{out}"],
    "tools/estimate.py": ["--config", "{config}"],
    "tools/plan.py": ["--config", "{config}", "--gpus", "8"],
    "tools/run_experiment.py": ["main", "--output", "{out}", "--dry-run"],
    "tools/upcycle.py": ["--input", "{run}", "--output", "{out}", "--iterations", "2"],
    "tools/verify_checkpoint.py": ["--input", "{run}"],
}
"""Commands that import Megatron-Core whatever they are given, with arguments to get them there."""

ALL_COMMANDS = """
import runpy, sys
for command, arguments in {commands!r}.items():
    sys.argv = [command, *arguments]
    print(command, file=sys.stderr, flush=True)
    try:
        runpy.run_path(command, run_name="__main__")
    except SystemExit as end:
        print("status", end.code, flush=True)
"""


def python(code: str, te: Path) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(REPO), str(te)])
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_a_gpu_everything_runs_on_torch(config, tmp_path):  # noqa: F811
    te = write_te(tmp_path / "te", __init__=NEEDS_A_GPU)
    result = python(CALLS.format(config=str(config)), te)
    statuses = [line for line in result.stdout.splitlines() if line.startswith("status")]
    assert statuses == ["status 0"] * 4 + ["status 2"] * 2, result.stderr[-3000:]
    assert result.stderr.count("Transformer Engine is installed but left aside") == 1
    *_, backend, fp8 = [line for line in result.stderr.splitlines() if "error:" in line]
    assert "backend='te' needs Transformer Engine, which is left aside: no CUDA device" in backend
    assert "fp8='hybrid' needs Transformer Engine" in fp8


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_one_is_told_in_one_line(config, tmp_path, kind):  # noqa: F811
    te = write_te(tmp_path / "te", **BROKEN[kind])
    result = python(
        f"import pretrain_coe; exit(pretrain_coe.main(['--config', {str(config)!r}]))", te
    )
    assert result.returncode == 2, result.stderr[-3000:]
    (line,) = [line for line in result.stderr.splitlines() if "W1" not in line]
    assert f"Transformer Engine ({te / 'transformer_engine'}) is installed but cannot be" in line
    assert (kind if kind.endswith("Error") else "NotFoundError: No ") in line
    assert "pip uninstall transformer-engine" in line
    assert not (tmp_path / "run").exists()


def test_every_command_tells_it(config, tmp_path):  # noqa: F811
    te = write_te(tmp_path / "te", **BROKEN["AssertionError"])
    places = {
        "config": config,
        "run": tmp_path,
        "text": tmp_path / "a.txt",
        "out": tmp_path / "out",
    }
    commands = {
        command: [argument.format(**places) for argument in arguments]
        for command, arguments in IMPORTING.items()
    }
    result = python(ALL_COMMANDS.format(commands=commands), te)
    assert result.stdout.splitlines() == ["status 2"] * len(commands), result.stderr[-3000:]
    lines = result.stderr.splitlines()
    assert lines[::2] == list(commands), "one line each"
    assert all("AssertionError: TE and torch do not fit. Install" in line for line in lines[1::2])


def test_one_that_lacks_a_module_at_once_counts_as_absent(config, tmp_path):  # noqa: F811
    """As Megatron-Core counts it; and asked for, it is refused with its reason."""
    te = write_te(tmp_path / "te", __init__="import a_module_that_is_not_installed")
    code = (
        f"import pretrain_coe; arguments = ['--config', {str(config)!r}, 'train.exit_step=1']\n"
        "print('status', pretrain_coe.main(arguments))\n"
        "print('status', pretrain_coe.main([*arguments, 'model.backend=te']))"
    )
    result = python(code, te)
    statuses = [line for line in result.stdout.splitlines() if line.startswith("status")]
    assert statuses == ["status 0", "status 2"], result.stderr[-3000:]
    assert "left aside" not in result.stderr
    assert "which cannot be imported (No module named 'a_module_that" in result.stderr
