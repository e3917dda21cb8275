"""What a run writes down of where it ran."""

from __future__ import annotations

import subprocess

import pytest
import torch

from megatron_coe.utils import environment
from megatron_coe.utils.environment import commit, read_machine, refuse_unused_gpus, write_machine
from megatron_coe.utils.run_files import MACHINE_FILE


def test_it_is_read_as_it_was_written(tmp_path) -> None:
    assert read_machine(tmp_path) == {}
    write_machine(tmp_path, torch.device("cpu"), ranks=6)
    found = read_machine(tmp_path)
    assert found["ranks"] == 6 and found["torch"] == torch.__version__
    assert {"platform", "processor", "cores", "memory_bytes", "python", "commit"} <= found.keys()
    assert [path.name for path in tmp_path.iterdir()] == [MACHINE_FILE]


@pytest.mark.parametrize("content", ["", "[1]", '{"cores": ', "[" * 100_000])
def test_a_broken_file_is_named(tmp_path, content: str) -> None:
    (tmp_path / MACHINE_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"machine\.json is no JSON object"):
        read_machine(tmp_path)


def test_the_commit_is_this_checkouts(tmp_path) -> None:
    def git(*arguments: str) -> str:
        ours = ("-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path))
        done = subprocess.run(
            ["git", *ours, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("a")
    assert commit(tmp_path / "inner") == "unknown"
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    name = git("rev-parse", "--short", "HEAD")
    assert commit(tmp_path) == name
    assert commit(tmp_path / "inner") == "unknown", "a folder within another's checkout"
    (tmp_path / "inner" / "file").write_text("b")
    assert commit(tmp_path) == name + "+"


SEES_NONE = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU")
SLURM = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0,1"}


@SEES_NONE
@pytest.mark.parametrize(
    "allocated", [{"SLURM_JOB_GPUS": "0"}, {"SLURM_STEP_GPUS": "3"}, {"SLURM_GPUS_ON_NODE": "8"}]
)
def test_gpus_of_slurms_that_pytorch_does_not_see_are_refused(allocated) -> None:
    (name, value), *_ = allocated.items()
    with pytest.raises(ValueError, match=f"^{name}={value}: Slurm has allocated GPUs"):
        refuse_unused_gpus(SLURM | allocated)


@SEES_NONE
@pytest.mark.parametrize("wish", ["", "-1", "NoDevFiles"])
def test_who_asks_for_the_cpu_gets_it(wish: str) -> None:
    allocated = {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": wish}
    assert refuse_unused_gpus(allocated) is None


@SEES_NONE
def test_a_gpu_of_the_drivers_that_is_not_used_is_warned_of(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(environment, "DEVICES", tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert refuse_unused_gpus({"SLURM_GPUS_ON_NODE": "0"}) is None
    (tmp_path / "nvidia0").touch()
    warning = refuse_unused_gpus({})
    assert warning.startswith(f"{tmp_path / 'nvidia0'} is not used: ")
    build = "is a build without CUDA" if torch.version.cuda is None else "says: "
    assert build in warning and "set CUDA_VISIBLE_DEVICES to nothing" in warning
    assert refuse_unused_gpus({"CUDA_VISIBLE_DEVICES": ""}) is None
