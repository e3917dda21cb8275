"""`versions.json`: the software that wrote a checkpoint, for when another cannot read it.

    {"python": "3.12.1", "torch": "2.13.0+cu130", "cuda": "13.0", "megatron-core": "0.19.2", …}

The manifest lists it like any other file; nothing is ever decided by it but what a message says.
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
_FORMAT_MAKERS = ("torch", "megatron-core", "megatron-coe")
"""Packages whose newer versions may write what earlier ones cannot read."""


def running_versions() -> dict[str, str | None]:
    """Return what this process runs on; `cuda` is that of torch's build, None for a CPU's."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "megatron-core": MEGATRON_VERSION,
        "megatron-coe": megatron_coe.__version__,
    }


def versions_text() -> str:
    """Return the content of `versions.json` for what this process writes."""
    return json.dumps(running_versions(), indent=1) + "\n"


def read_versions(folder: Path) -> dict[str, str]:
    """Return what wrote a checkpoint; empty where it does not say, or not in a way to be read."""
    try:
        content = json.loads((folder / VERSIONS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {name: value for name, value in content.items() if isinstance(value, str)}


def unreadable_error(folder: Path, error: BadCheckpointError) -> BadCheckpointError:
    """Return the error to raise for a checkpoint that this process cannot read.

    One that was written by a newer torch, megatron-core or megatron_coe is not called damaged: the
    message names the versions running, those that wrote it, and what to do.
    """
    written, running = read_versions(folder), running_versions()
    newer = [name for name in _FORMAT_MAKERS if _is_newer(written.get(name), running[name])]
    if not newer:
        return error
    theirs, ours = (
        ", ".join(f"{name} {found[name]}" for name in (*_FORMAT_MAKERS, "python") if name in found)
        for found in (written, running)
    )
    needed = " and ".join(f"{name} {Version(written[name]).public}" for name in newer)
    return NewerCheckpointError(
        f"{ours} cannot read what {theirs} wrote ({error}): install {needed} or newer, or resume "
        "from an earlier checkpoint"
    )


def _is_newer(theirs: str | None, ours: str) -> bool:
    """Compare releases: what stands behind a plus (`+cpu`, `+cu130`) is a build's name."""
    try:
        public = [Version(Version(version or "0").public) for version in (theirs, ours)]
    except InvalidVersion:
        return False
    return public[0] > public[1]
