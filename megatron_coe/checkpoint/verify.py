"""Verification of a checkpoint before anything in it is unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_coe.checkpoint.errors import BadCheckpointError
from megatron_coe.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    check_sizes,
    read_manifest,
    unlisted,
    verify_files,
)
from megatron_coe.checkpoint.safe_unpickle import INDEX_FILE, Contents, check_pickles, read_contents
from megatron_coe.checkpoint.versions import VERSIONS_FILE
from megatron_coe.utils.run_files import COMMON_FILE, CONFIG_FILE, FORMAT_FILE, step_of


def verify_checkpoint(
    folder: Path, verify: bool = True, part: int = 0, parts: int = 1
) -> dict[str, Any]:
    """Compare a checkpoint with its manifest, then check its pickles without executing them.

    Args:
        verify: False ignores the manifest.
        part, parts: read this part of `parts` of the files (ranks share the work).

    Returns: the common values of the state, the same for all ranks.

    Raises:
        BadCheckpointError: naming the file and what is wrong with it, or the versions it needs.
        OSError: a file cannot be read.
    """
    manifest = read_manifest(folder) if verify else None
    if manifest:
        verify_files(folder, manifest, part, parts, (INDEX_FILE, COMMON_FILE, FORMAT_FILE))
    contents = check_pickles(folder, part, parts)
    step = _step_inside(contents.common)
    if manifest:
        _check_manifest(folder, manifest, contents, step)
    if step_of(folder) not in (None, step):
        raise BadCheckpointError(f"holds step {step}: the folder has been renamed or exchanged")
    return contents.common


def is_loadable(folder: Path) -> bool:
    """Return whether this process could load a checkpoint, without reading or hashing its tensors.

    Its index, its common values and the sizes of its files are checked.
    """
    try:
        contents = read_contents(folder)
        if (folder / MANIFEST_FILE).exists():
            manifest = read_manifest(folder)
            check_sizes(folder, manifest)
            _check_manifest(folder, manifest, contents, _step_inside(contents.common))
    except (BadCheckpointError, OSError):
        return False
    return True


def unlisted_files(folder: Path) -> str | None:
    """Return a warning about files that a valid checkpoint's manifest does not list; None: no such.

    They are not read, and are deleted with the checkpoint.
    """
    found = unlisted(folder, read_manifest(folder))
    if not found:
        return None
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{folder}: {MANIFEST_FILE} does not list {found[0]}{more}; not read, nor verified"


def _check_manifest(folder: Path, manifest: Manifest, contents: Contents, step: int) -> None:
    """Check that a manifest belongs to this state and lists every file that would be read."""
    if manifest.step != step:
        raise BadCheckpointError(f"{MANIFEST_FILE} says step {manifest.step}, not {step}")
    needed = {place.relative_path for place in contents.index.storage_data.values()}
    needed |= {INDEX_FILE, FORMAT_FILE, CONFIG_FILE}
    needed |= {name for name in (COMMON_FILE, VERSIONS_FILE) if (folder / name).exists()}
    if unlisted := sorted(needed - manifest.files.keys()):
        raise BadCheckpointError(f"{MANIFEST_FILE} does not list {unlisted[0]}")


def _step_inside(common: dict[str, Any]) -> int:
    """Return the step in a checkpoint's common values."""
    progress = common.get("progress")
    step = progress.get("step") if isinstance(progress, dict) else None
    if type(step) is not int:
        raise BadCheckpointError(f"{COMMON_FILE}: holds no state of a run")
    return step
