"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Where `path` is written until it is complete; machine and process keep two writers apart."""
    return path.with_name(f".{path.name}.partial-{platform.node()}-{os.getpid()}")


@contextmanager
def naming_errors(path: Path, mend: str = "") -> Iterator[None]:
    """An OSError inside says that `path` cannot be written, and why (a full disk does not).

    Args:
        mend: what could be done about it, unless the reason speaks for itself.
    """
    try:
        yield
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror or error}"
        raise OSError(f"{reason}; {mend}" if mend else reason) from error


def check_writable(path: Path) -> None:
    """See before long work that a file could be written at `path`; nothing is made.

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
    """Give a file the mode of a new one; some libraries write through private temporary files."""
    probe = path.with_name(f".{path.name}.mode-{os.getpid()}")
    probe.touch()
    try:
        path.chmod(probe.stat().st_mode)
    finally:
        probe.unlink()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`, renamed to it on success and removed on any failure.

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
