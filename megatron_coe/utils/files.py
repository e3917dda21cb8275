"""Files and folders that appear under their names only when they are complete."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Return where `path` is written until it is complete.

    The names of the machine and the process keep two writers apart.
    """
    return path.with_name(f".{path.name}.partial-{platform.node()}-{os.getpid()}")


@contextmanager
def naming_errors(path: Path, fix: str = "") -> Iterator[None]:
    """Name `path` in each OSError raised inside: that of a full disk, for one, names no file.

    Args:
        fix: what to do about it; empty if the reason suffices.

    Raises: OSError.
    """
    try:
        yield
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror or error}"
        raise OSError(f"{reason}; {fix}" if fix else reason) from error


def check_writable(path: Path) -> None:
    """Check before long work that a file could be written at `path`; nothing is created.

    Raises: OSError naming it.
    """
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"cannot write {path}: {parent} is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: {parent} cannot be written")


def give_default_mode(path: Path) -> None:
    """Give a file the mode of a new one; some libraries write through private temporary files.

    Raises: OSError.
    """
    probe = path.with_name(f".{path.name}.mode-{os.getpid()}")
    probe.touch()
    try:
        path.chmod(probe.stat().st_mode)
    finally:
        probe.unlink()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to it on success and removed on any failure.

    Raises: OSError naming `path`, e.g. when the disk is full.
    """
    temporary = partial_path(path)
    try:
        with naming_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, renamed to `folder` on success and removed on any failure.

    Raises: OSError naming `folder`.
    """
    temporary = partial_path(folder)
    try:
        with naming_errors(folder):
            temporary.mkdir(parents=True)
        yield temporary
        with naming_errors(folder):
            temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
