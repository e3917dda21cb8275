"""What the batch scripts and their launcher do without a Slurm; tests/slurm has the rest."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SCRIPTS = sorted((REPO / "slurm").glob("*.sbatch"))


def bash(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return subprocess.run(
        ["bash", *map(str, arguments)],
        cwd=REPO,
        env={**outside, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    files = [*SCRIPTS, *(REPO / "slurm").glob("*.sh"), REPO / "tests" / "slurm" / "install.sh"]
    command = ["shellcheck", "--external-sources", *files]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_that_no_batch_job_runs_says_what_to_do(script):
    done = bash(script, "--config", "examples/quickstart.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert f"{script.stem}: error: " in done.stderr
    assert f"slurm/{script.name}" in done.stderr


def test_a_sweep_covers_every_preset_of_the_paper():
    header, *runs = bash(REPO / "slurm" / "sweep.sbatch", "--list").stdout.splitlines()
    presets = {f"examples/paper/{p.name}" for p in (REPO / "examples/paper").glob("*.yaml")}
    presets.remove("examples/paper/base.yaml")
    assert header == f"--array=0-{len(runs) - 1}"
    assert [int(run.split()[0]) for run in runs] == list(range(len(runs)))
    expected = {(p, f"train.seed={seed}") for p in presets for seed in (42, 43, 44)}
    assert {tuple(run.split()[1:]) for run in runs} == expected


@pytest.mark.parametrize(
    ("ending", "status"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137)]
)
def test_the_launcher_ends_as_its_rank_did(tmp_path, ending, status):
    """It is asked to pass a signal on before its rank listens, which must not be lost."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys\n"
        "from megatron_coe.training.signals import StopRequest\n"
        "stop = StopRequest()\n"
        "os.kill(os.getppid(), 15)\n"
        "with stop.listening():\n"
        "    while not stop.received: pass\n"
        f"{ending}\n"
    )
    command = [sys.executable, REPO / "slurm" / "launch.py", "--standalone", worker]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{signal.SIGTERM.name}: ends before the next step" in done.stderr
