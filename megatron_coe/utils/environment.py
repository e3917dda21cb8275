"""The machine, the software versions and the commit that a process runs on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from megatron_coe.utils.files import atomic_path
from megatron_coe.utils.run_files import MACHINE_FILE

PACKAGES = (
    "megatron-coe",
    "megatron-core",
    "triton",
    "transformer-engine",
    "transformers",
)
REPOSITORY = Path(__file__).resolve().parents[2]
DEVICES = Path("/dev")


def write_machine(folder: Path, device: torch.device, ranks: int) -> dict[str, object]:
    """Write `machine.json` into a run's folder, and return its content. Raises: OSError."""
    found = {**machine(device), "ranks": ranks, "commit": commit(), **versions()}
    with atomic_path(folder / MACHINE_FILE) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def read_machine(folder: Path) -> dict[str, object]:
    """Read a run's `machine.json`; empty where there is none. Raises: ValueError, OSError."""
    path = folder / MACHINE_FILE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object: remove it, or let the run write it again")
    return found


def machine(device: torch.device) -> dict[str, object]:
    """Describe the machine of this rank; `gpus` counts those that it can see."""
    found: dict[str, object] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpus": torch.cuda.device_count()}
        found |= {"gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def refuse_unused_gpus(environment: Mapping[str, str] = os.environ) -> str | None:
    """Look for GPUs that this process could use, if PyTorch sees none.

    An empty CUDA_VISIBLE_DEVICES asks for the CPU.

    Returns: a warning about GPUs that the driver shows; None if there is nothing to say.

    Raises: ValueError: Slurm has allocated GPUs, which the job would pay for and leave idle.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available() or visible in ("", "-1", "NoDevFiles"):  # Slurm's word for none
        return None
    way_out = "to train on the CPU, set CUDA_VISIBLE_DEVICES to nothing"
    for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        count = environment.get(name)
        if count and (name, count) != ("SLURM_GPUS_ON_NODE", "0"):
            raise ValueError(
                f"{name}={count}: Slurm has allocated GPUs, and PyTorch sees none: "
                f"{_why_no_gpu()}; {way_out}"
            )
    if gpus := sorted(DEVICES.glob("nvidia[0-9]*")):
        return f"{', '.join(map(str, gpus))} is not used: {_why_no_gpu()}; {way_out}"
    return None


def _why_no_gpu() -> str:
    """Return why PyTorch sees no GPU, and what to do."""
    if torch.version.cuda is None:
        return (
            f"PyTorch {torch.__version__} is a build without CUDA: install the one that "
            "https://pytorch.org/get-started names for this driver"
        )
    if not list(DEVICES.glob("nvidia*")):
        return (
            f"no NVIDIA driver is visible here, in {DEVICES}: in a container pass it on "
            "(apptainer exec --nv, docker run --gpus all)"
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())
        return f"PyTorch {torch.__version__} says: {said}"
    return f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')} names none of them"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that matter.

    torch's is given with its build (`+cpu`, `+cu130`), which its package metadata leave out.
    """
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit(repository: Path = REPOSITORY) -> str:
    """Return the commit checked out, with `+` where files differ from it.

    `unknown` where `repository` is no checkout: an installed package may lie within another's.
    """
    try:
        if _git(repository, "rev-parse", "--show-prefix"):
            return "unknown"
        name = _git(repository, "rev-parse", "--short", "HEAD")
        changed = _git(repository, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed else "")


def _git(repository: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    """Return the processor's name from Linux; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
