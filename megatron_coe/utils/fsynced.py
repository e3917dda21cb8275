"""Files that survive a power cut, and their digests.

A file's content is on the disk after its own fsync, its name only after an fsync of its folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, ParamSpec, TypeVar

ALGORITHMS = {"xxh3_128": "XXH3-128", "sha256": "SHA-256"}
"""Digests that a manifest may name, and what they are called.

Both notice any change by accident. Neither is a signature: who can change a file can change its
digest, too.
"""

DIGEST = "xxh3_128" if importlib.util.find_spec("xxhash") else "sha256"
"""That of new files: at the speed of memory, where SHA-256 would take a third of a save.

The package is a dependency that an environment of an earlier version may lack.
"""

_BLOCK = 1 << 20

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class FileDigest:
    """Size and digest of a file, as a manifest lists them."""

    size: int
    """Bytes."""
    value: str
    """Hexadecimal."""
    algorithm: str = DIGEST
    """One of `ALGORITHMS`."""


def new_hash(algorithm: str) -> Any:
    """Return an empty hash, with the methods of hashlib's."""
    if algorithm == "sha256":
        return hashlib.sha256()
    import xxhash

    return xxhash.xxh3_128()


def fsync(path: Path) -> None:
    """Fsync a file's content, or the names in a folder. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_fsynced(path: Path, content: bytes) -> FileDigest:
    """Write a small file and fsync it, but not its name. Raises: OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    digest = new_hash(DIGEST)
    digest.update(content)
    return FileDigest(len(content), digest.hexdigest())


def replace_fsynced(path: Path, content: bytes) -> None:
    """Replace a small file atomically, and fsync it and its name. Raises: OSError."""
    temporary = path.with_name(f".{path.name}.new")
    write_fsynced(temporary, content)
    temporary.replace(path)
    fsync(path.parent)


def digest_of(path: Path, algorithm: str = DIGEST) -> FileDigest:
    """Return size and digest of an existing file. Raises: OSError."""
    digest, size = new_hash(algorithm), 0
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
    return FileDigest(size, digest.hexdigest(), algorithm)


class HashedFile:
    """A new file, hashed while it is written, and fsynced when it is closed.

    Args:
        hashed: False leaves the digest out.
    """

    def __init__(self, path: Path, hashed: bool = True) -> None:
        self.error: OSError | None = None
        """The first error of a write, which torch.save replaces with one of its own."""
        self._file = path.open("wb", buffering=0)
        self._size = 0
        self._digest = new_hash(DIGEST) if hashed else None

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`, and return its size in bytes. Raises: OSError."""
        view = memoryview(data).cast("B")
        try:
            done = 0
            while done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            self.error = self.error or error
            raise
        self._size += done
        if self._digest is not None:
            self._digest.update(view)
        return done

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._size

    def flush(self) -> None:
        """Do nothing, as nothing is buffered; torch.save asks for it."""

    def close(self) -> FileDigest:
        """Fsync and close the file; return its digest, empty where `hashed` is False.

        Raises: OSError.
        """
        try:
            os.fsync(self._file.fileno())
            return FileDigest(self._size, self._digest.hexdigest() if self._digest else "")
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close the file without fsync, if it is still open."""
        self._file.close()


def in_background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Call a function in a daemon thread, which does not keep the process from exiting."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=call, daemon=True).start()
    return future
