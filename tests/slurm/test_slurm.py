"""The batch scripts on a real Slurm of two nodes: limits, requeues, arrays, failures.

Ranks run on the CPU; the scripts are those of a GPU cluster, unchanged.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional.test_pretrain import CONFIG, REPO, data, losses  # noqa: F401  (a fixture)
from tests.slurm.cluster import Cluster, obstacle

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(obstacle() is not None, reason=f"no Slurm: {obstacle()}"),
]
ENDLESS = "1000000"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def config(data, tmp_path) -> Path:  # noqa: F811
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(data=data, folder=tmp_path / "run"), encoding="utf-8")
    return path


@pytest.fixture
def submit(cluster, tmp_path):
    """`sbatch` as from a terminal in the repository, on CPUs, logs in the test's own folder."""

    def submit(*arguments: object, home: Path = REPO, **environment: str) -> str:
        return cluster.submit(
            home,
            f"--output={tmp_path}/%x.out",
            *arguments,
            PYTHON=sys.executable,
            CUDA_VISIBLE_DEVICES="",
            OMP_NUM_THREADS="1",
            # Two nodes of one machine: their names are known to Slurm only.
            MASTER_ADDR="127.0.0.1",
            LOG_DIR=str(tmp_path / "logs"),
            **environment,
        )

    return submit


def output(folder: Path, name: str = "coe") -> str:
    path = folder / f"{name}.out"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def latest(run: Path) -> int:
    """The step of the newest checkpoint, which has to be whole."""
    name = (run / "checkpoints" / "latest").read_text().strip()
    assert (run / "checkpoints" / name / "metadata.json").is_file()
    return int(name.removeprefix("step_"))


def test_a_time_limit_interrupts_a_run_that_then_ends_as_if_it_had_not(
    cluster, submit, config, tmp_path
):
    """Slurm's own signal -> checkpoint -> requeue -> resume -> finish; then both are converted."""
    limited = ("--nodes=2", "--time=6", "--signal=USR1@250", REPO / "slurm/pretrain.sbatch")
    constant = ("train.lr_warmup_fraction=0", f"train.steps={ENDLESS}", "train.eval_interval=50")
    job = submit(*limited, "--config", config, *constant)

    def steps_at_stops() -> list[int]:
        return [
            int(step)
            for step in re.findall(r"stopped by SIGUSR1 after step (\d+)", output(tmp_path))
        ]

    # On a busy machine the first limit may come before the first step: that is no failure.
    cluster.wait(job, lambda: max(steps_at_stops(), default=0) > 0)
    last = steps_at_stops()[-1] + 3
    text = config.read_text(encoding="utf-8").replace("train:\n", f"train:\n  exit_step: {last}\n")
    config.write_text(text, encoding="utf-8")  # read by the next start, 20 s from now
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), output(tmp_path)
    assert int(ended["Restarts"]) == len(steps_at_stops())
    assert f"resumed from {tmp_path}/run/checkpoints/step_{last - 3:08d}" in output(tmp_path)
    for restart in range(int(ended["Restarts"]) + 1):
        for node in (0, 1):
            folder = tmp_path / "logs" / f"{job}.{restart}" / f"node_{node}"
            assert len(list(folder.rglob("stderr.log"))) == 1, "one rank per node"

    unbroken = tmp_path / "unbroken"
    reference = submit(
        *("--nodes=2", "--job-name=reference", REPO / "slurm/pretrain.sbatch", "--config", config),
        *(*constant, f"log.dir={unbroken}"),
    )
    ended = cluster.finish(reference)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), output(
        tmp_path, "reference"
    )
    for name in ("train_loss", "valid_loss", "grad_norm"):
        assert losses(tmp_path / "run", name) == losses(unbroken, name)
    assert len(losses(unbroken)) == last

    weights = []
    for run in (tmp_path / "run", unbroken):
        exported = tmp_path / f"{run.name}-hf"
        convert = (REPO / "slurm/convert.sbatch", "to-hf", "--input", run / "checkpoints")
        converted = cluster.finish(submit("--mem=1G", *convert, "--output", exported))
        assert converted["JobState"] == "COMPLETED", output(tmp_path, "coe-convert")
        weights.append((exported / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_sweep_trains_each_configuration_with_each_seed(cluster, submit, config, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(f"extends: {config.name}\nmodel: {{coe_iterations: 1}}\n", encoding="utf-8")
    lists = {"CONFIGS": f"{config} {other}", "SEEDS": "7 8"}
    script = REPO / "slurm/sweep.sbatch"
    table = subprocess.run(
        ["bash", script, "--list"], cwd=REPO, env={**cluster.environment, **lists},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert table.stdout.splitlines() == [
        "--array=0-3",
        *(f"{i} {c} train.seed={s}" for i, (c, s) in enumerate(
            (c, s) for c in (config, other) for s in (7, 8)
        )),
    ]  # fmt: skip
    options = ("--array=1-2,4", f"--output={tmp_path}/%a.out", script, "train.steps=2")
    job = submit(*options, **lists, SWEEP_DIR=str(tmp_path / "sweep"))
    for index, (name, seed, iterations) in {1: ("run", 8, 2), 2: ("other", 7, 1)}.items():
        ended = cluster.finish(f"{job}_{index}")
        assert ended["JobState"] == "COMPLETED", output(tmp_path, str(index))
        run = tmp_path / "sweep" / name / f"seed_{seed}"
        assert latest(run) == 2
        settings = (run / "config.yaml").read_text(encoding="utf-8")
        assert f"seed: {seed}\n" in settings
        assert ("coe_iterations: 1" in settings) == (iterations == 1)
    ended = cluster.finish(f"{job}_4")
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    assert "there are 4 runs, --array=0-3" in output(tmp_path, "4")


def test_a_cancelled_run_is_saved_and_stays_cancelled(cluster, submit, config, tmp_path):
    job = submit(REPO / "slurm/pretrain.sbatch", "--config", config, f"train.steps={ENDLESS}")
    cluster.wait(job, lambda: output(tmp_path).count("step ") > 3)
    cluster.command("scancel", job)
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert latest(tmp_path / "run") == max(losses(tmp_path / "run"))


def test_requeues_are_limited(cluster, submit, config, tmp_path):
    """SIGTERM, as from a preemption that gives time, with no requeue left."""
    script = REPO / "slurm/pretrain.sbatch"
    job = submit(script, "--config", config, f"train.steps={ENDLESS}", MAX_REQUEUES="0")
    cluster.wait(job, lambda: output(tmp_path).count("step ") > 3)
    cluster.command("scancel", "--signal=TERM", job)
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0")
    assert "not requeued, after 0 times" in output(tmp_path)
    assert latest(tmp_path / "run") == max(losses(tmp_path / "run"))


def test_a_job_that_may_not_be_requeued_is_not_said_to_be(cluster, submit, config, tmp_path):
    script = REPO / "slurm/pretrain.sbatch"
    job = submit("--no-requeue", script, "--config", config, f"train.steps={ENDLESS}")
    cluster.wait(job, lambda: output(tmp_path).count("step ") > 3)
    cluster.command("scancel", "--signal=TERM", job)
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0")
    assert "not requeued, because Slurm refuses" in output(tmp_path)
    assert "saved; requeued" not in output(tmp_path)


def test_a_mistake_ends_a_job_failed_and_it_is_not_requeued(cluster, submit, config, tmp_path):
    script = REPO / "slurm/pretrain.sbatch"
    mistakes = {
        "settings": (["--config", config, "train.stpes=1"], {}, "did you mean 'steps'?"),
        "no_config": (["train.steps=1"], {}, "error: no --config: sbatch slurm/pretrain.sbatch"),
        "no_file": (["--config=nowhere.yaml"], {}, "--config nowhere.yaml: there is no such file"),
        "count": (["--config", config], {"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE='two'"),
        "module": (["--config", config], {"MODULES": "cuda/12"}, "no command 'module' here"),
        "place": (["--config", config], {"home": tmp_path}, f"{tmp_path} is not the repository"),
    }
    jobs = {
        name: submit(f"--job-name={name}", script, *arguments, **options)
        for name, (arguments, options, _) in mistakes.items()
    }
    for name, (_, _, message) in mistakes.items():
        ended = cluster.finish(jobs[name])
        assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), name
        assert ended["Restarts"] == "0"
        assert message in output(tmp_path, name), name
    started = [folder.name for folder in (tmp_path / "logs").iterdir()]
    assert started == [f"{jobs['settings']}.0"], "the others were found before srun"
    assert not (tmp_path / "run").exists()
