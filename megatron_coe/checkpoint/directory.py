"""The folder of a run's checkpoints: names, the `latest` pointer, and which ones are kept.

    <save>/step_00000100/           a checkpoint; it has this name only when it is complete
    <save>/latest                   name of the newest one, for people and scripts
    <save>/.partial_step_00000200/  one that is being written, or was when the run died
    <save>/.removed_step_00000050/  one that is being deleted, or has just been replaced

Each change is one rename followed by an fsync of the folder, so that a run that dies between any
two instructions leaves a folder that the next run can use.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_coe.utils.fsynced import fsync, replace_fsynced
from megatron_coe.utils.run_files import FORMAT_FILE, LATEST_FILE, step_name, step_of

if TYPE_CHECKING:
    from megatron_coe.config.run_config import CheckpointSettings

_PARTIAL, _REMOVED = ".partial_", ".removed_"


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first, without verifying them."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(named, key=_step, reverse=True)


def resolve_checkpoint(checkpoint: Path) -> Path:
    """Return `checkpoint` if it is one, or the newest of those in it.

    Raises: ValueError if it is neither.
    """
    if (checkpoint / FORMAT_FILE).is_file():
        return checkpoint
    found = find_checkpoints(checkpoint)
    if not found:
        raise ValueError(f"{checkpoint}: neither a checkpoint nor a folder of checkpoints")
    return found[0]


def check_start(options: CheckpointSettings) -> None:
    """Raise ValueError when a run is to start from weights, and there are none."""
    own = find_checkpoints(Path(options.save)) if options.save else []
    if options.load is None or any((path / FORMAT_FILE).is_file() for path in own):
        return
    try:
        resolve_checkpoint(Path(options.load))
    except ValueError as error:
        is_exported = Path(options.load, "config.json").is_file()
        raise ValueError(
            f"checkpoint.load={options.load}: "
            + (
                "a Hugging Face folder becomes a checkpoint by coe convert from-hf"
                if is_exported
                else "there is no checkpoint to start from; name one, or null for initial weights"
            )
        ) from error


def partial_folder(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is written until it is complete."""
    return folder / f"{_PARTIAL}{step_name(step)}"


def publish(folder: Path, step: int) -> Path:
    """Rename a complete partial checkpoint to its final name, and return that. Raises: OSError."""
    partial, final = partial_folder(folder, step), folder / step_name(step)
    fsync(partial)
    replaced = folder / f"{_REMOVED}{final.name}"
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    fsync(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def update_latest(checkpoint: Path) -> None:
    """Write a checkpoint's name into `latest`. Raises: OSError."""
    pointer = checkpoint.with_name(LATEST_FILE)
    if pointer.is_dir():  # not ours, so it is moved away and not deleted
        pointer.rename(checkpoint.with_name(f"{LATEST_FILE}_before_{checkpoint.name}"))
    replace_fsynced(pointer, f"{checkpoint.name}\n".encode())


def prune(
    folder: Path,
    step: int,
    keep: int,
    keep_every: int,
    is_loadable: Callable[[Path], bool],
    needed: Collection[Path] = (),
) -> list[OSError]:
    """Delete old checkpoints after that of `step` was published.

    Kept are the `keep` newest that this process could load, all newer than the oldest of these,
    those whose step is a multiple of `keep_every` (0: none), and those that hold a needed file. One
    that cannot be loaded is not counted, or it would have a valid one deleted in its place. Those
    after `step`, which were found bad when the run resumed, are neither counted nor deleted.

    Args:
        is_loadable: called for the newest first, and for none older than the last to keep.
        needed: files or folders anywhere that the run reads.

    Returns: one error for each deletion that failed; the next call tries again.
    """
    wanted, old = keep, []
    holding = {parent for path in needed for parent in (path.resolve(), *path.resolve().parents)}
    for path in find_checkpoints(folder):
        if _step(path) > step:
            continue
        if wanted == 0:
            is_between = keep_every == 0 or _step(path) % keep_every
            if is_between and path.resolve() not in holding:
                old.append(path)
        elif is_loadable(path):
            wanted -= 1
    errors = []
    for path in [*folder.glob(f"{_REMOVED}step_*"), *old]:  # and those half deleted before
        try:
            _remove(path)
        except OSError as error:
            errors.append(error)
    return errors


def restore_replaced(folder: Path) -> None:
    """Rename checkpoints back whose replacement was never published, because the run died."""
    for removed in folder.glob(f"{_REMOVED}step_*"):
        final = folder / removed.name.removeprefix(_REMOVED)
        if not final.exists() and (folder / f"{_PARTIAL}{final.name}").exists():
            removed.rename(final)
            fsync(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete what a run that died has left incomplete. Raises: OSError."""
    restore_replaced(folder)
    for pattern in (f"{_REMOVED}step_*", f"{_PARTIAL}step_*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
    (folder / f".{LATEST_FILE}.new").unlink(missing_ok=True)


def check_latest(folder: Path, found: list[Path]) -> str | None:
    """Compare `latest` with the checkpoints found, the newest first.

    It never decides what is loaded: the names of the folders do.

    Returns: what is wrong with it; None if nothing is.
    """
    path = folder / LATEST_FILE
    try:
        name = path.read_bytes()[:100].decode().removesuffix("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return f"{path}: cannot be read"
    names = [checkpoint.name for checkpoint in found]
    if name not in names:
        return f"{path}: names {name!r}, and there is no such checkpoint"
    if name != names[0]:
        return f"{path}: names {name}, and the newest is {names[0]}"
    return None


def _step(checkpoint: Path) -> int:
    step = step_of(checkpoint)
    assert step is not None
    return step


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; a half deleted one never keeps its name."""
    removed = checkpoint
    if not checkpoint.name.startswith(_REMOVED):
        removed = checkpoint.with_name(f"{_REMOVED}{checkpoint.name}")
        shutil.rmtree(removed, ignore_errors=True)
        checkpoint.rename(removed)
        fsync(checkpoint.parent)
    shutil.rmtree(removed)
