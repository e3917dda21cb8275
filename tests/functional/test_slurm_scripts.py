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
    # `make PYTHON=…` hands its own on to what it starts.
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PYTHON"))}
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


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing():
    command = ["hadolint", REPO / "Containerfile"]
    done = subprocess.run(command, capture_output=True, text=True)
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
    for page in (REPO / "slurm" / "README.md", REPO / "slurm" / "sweep.sbatch"):
        assert f"sbatch {header}%8 " in page.read_text(encoding="utf-8"), f"{page} has all runs"


STAND_IN = """#!/bin/bash
# What a command of Slurm's was asked for, and an answer.
echo "${0##*/} $*" >> "$ASKED"
case "${0##*/} $*" in
    "scontrol show"*) echo node1 ;;
    squeue*) echo RUNNING ;;
    srun*) exit 75 ;;
    "scontrol requeue"*) echo "scontrol ran" && exit "$REQUEUE" ;;
esac
"""
SLURM = ("srun", "squeue", "scontrol", "sleep", "apptainer", "numactl")
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"}


@pytest.fixture
def job(tmp_path):
    """`pretrain.sbatch` of a checkout with an environment, and what it asks of Slurm."""
    home, commands = tmp_path / "checkout", tmp_path / "bin"
    shutil.copytree(REPO / "slurm", home / "slurm")
    (home / "run.yaml").touch()
    (home / ".venv" / "bin").mkdir(parents=True)
    commands.mkdir()
    programs = {commands / name: STAND_IN for name in SLURM}
    programs[home / ".venv" / "bin" / "python"] = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    for program, text in programs.items():
        program.write_text(text)
        program.chmod(0o755)

    def submit(requeue: int = 0, **site: str) -> tuple[subprocess.CompletedProcess[str], str]:
        environment = {
            **JOB,
            **site,
            "COE_HOME": str(home),
            "ASKED": str(tmp_path / "asked"),
            "REQUEUE": str(requeue),
            "PATH": f"{commands}:{os.environ['PATH']}",
        }
        done = bash(home / "slurm" / "pretrain.sbatch", "--config", "run.yaml", **environment)
        asked = (tmp_path / "asked").read_text().splitlines()
        return done, next(line for line in asked if line.startswith("srun "))

    submit.home = home
    return submit


def test_a_job_names_its_files_wherever_it_starts(job):
    """A container of pyxis' starts in a folder of the image."""
    image = "--container-image=nvcr.io#nvidia/pytorch:25.06-py3"
    _, srun = job(SRUN_OPTIONS=f"{image} --container-mounts=/shared")
    assert f" {image} --container-mounts=/shared --container-workdir={job.home} " in srun
    assert f" python3 {job.home}/slurm/launch.py " in srun
    assert f" {job.home}/pretrain_coe.py --config run.yaml" in srun


def test_a_workdir_of_ones_own_is_kept(job):
    _, srun = job(SRUN_OPTIONS="--container-image=i --container-workdir=/w", PYTHON="python3.12")
    assert srun.count("--container-workdir") == 1 and " --container-workdir=/w " in srun
    assert " python3.12 /" in srun


@pytest.mark.parametrize(
    ("prefix", "python"),
    [
        ("", ".venv"),
        ("numactl --localalloc", ".venv"),
        ("apptainer exec --nv i.sif", "container"),
    ],
)
def test_only_outside_a_container_the_environment_of_the_checkout_is_taken(job, prefix, python):
    _, srun = job(COMMAND_PREFIX=prefix)
    expected = f"{job.home}/.venv/bin/python" if python == ".venv" else "python3"
    assert f"{prefix} {expected} {job.home}/slurm/launch.py " in srun


def test_what_slurm_does_not_requeue_is_not_said_to_be(job):
    done, _ = job(requeue=1)
    assert done.returncode == 75
    assert "pretrain: stopped and saved; requeued" not in done.stdout
    assert "not requeued, because Slurm refuses" in done.stderr
    done, _ = job(requeue=0)
    assert done.stdout.index("scontrol ran") < done.stdout.index("stopped and saved; requeued")


@pytest.mark.parametrize(
    ("ending", "status"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137)]
)
def test_the_launcher_ends_as_its_rank_did(tmp_path, ending, status):
    """It is asked to pass a signal on before its rank listens, which must not be lost."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys\n"
        "from megatron_coe.fault_tolerance.signals import StopRequest\n"
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
    assert f"{signal.SIGTERM.name}: stopping before the next step" in done.stderr
