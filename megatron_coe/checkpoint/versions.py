"""`versions.json`: the software that wrote a checkpoint, for messages when another cannot read it.

    {"python": "3.12.1", "torch": "2.13.0+cu130", "cuda": "13.0", "megatron-core": "0.19.2", …}

The manifest lists it like any other file. Versions alone refuse nothing.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch
from megatron.core import __version__ as MEGATRON_VERSION
from packaging.version import InvalidVersion, Version

import megatron_coe
from megatron_coe.checkpoint.errors import BadCheckpointError, NewerCheckpointError

VERSIONS_FILE = "versions.json"
_FORMAT_PACKAGES = ("torch", "megatron-core", "megatron-coe")
"""Packages whose newer versions may write what earlier ones cannot read."""


def running_versions() -> dict[str, str | None]:
    """Return the versions that this process runs; `cuda` is torch's, None for a CPU build."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "megatron-core": MEGATRON_VERSION,
        "megatron-coe": megatron_coe.__version__,
    }


def versions_text() -> str:
    """Return the content of `versions.json` for checkpoints of this process."""
    return json.dumps(running_versions(), indent=1) + "\n"


def read_versions(folder: Path) -> dict[str, str]:
    """Return the versions that wrote a checkpoint; empty where they are absent or unreadable."""
    try:
        content = json.loads((folder / VERSIONS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {name: value for name, value in content.items() if isinstance(value, str)}


def unreadable_error(folder: Path, error: BadCheckpointError) -> BadCheckpointError:
    """Return the error to raise for a checkpoint that this process cannot read.

    Where a newer torch, megatron-core or megatron_coe wrote it, the error does not call it damaged,
    but names the versions running, those that wrote it, and what to install.

    Args:
        error: of the reading, returned as it is if no newer version wrote the checkpoint.
    """
    written, running = read_versions(folder), running_versions()
    newer = [name for name in _FORMAT_PACKAGES if _is_newer(written.get(name), running[name])]
    if not newer:
        return error
    named = (*_FORMAT_PACKAGES, "python")
    theirs, ours = (
        ", ".join(f"{name} {versions[name]}" for name in named if name in versions)
        for versions in (written, running)
    )
    needed = " and ".join(f"{name} {Version(written[name]).public}" for name in newer)
    return NewerCheckpointError(
        f"{ours} cannot read what {theirs} wrote ({error}): install {needed} or newer, or resume "
        "from an earlier checkpoint"
    )


def _is_newer(theirs: str | None, ours: str | None) -> bool:
    """Compare releases, without the names of builds (`+cpu`, `+cu130`)."""
    try:
        public = [Version(Version(version or "0").public) for version in (theirs, ours)]
    except InvalidVersion:
        return False
    return public[0] > public[1]
