"""Files that survive a power cut, hashed while they are written.

A file's content is on the disk after its own fsync, its name only after an fsync of its folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import ParamSpec, TypeVar

import numpy as np

_BLOCK = 1 << 20

Buffer = bytes | memoryview
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class FileDigest:
    """Size and hash of a file, as a manifest lists them."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""


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
    return FileDigest(len(content), hashlib.sha256(content).hexdigest())


def replace_fsynced(path: Path, content: bytes) -> None:
    """Replace a small file atomically, and fsync it and its name. Raises: OSError."""
    temporary = path.with_name(f".{path.name}.new")
    write_fsynced(temporary, content)
    temporary.replace(path)
    fsync(path.parent)


def digest_of(path: Path) -> FileDigest:
    """Return size and SHA-256 of an existing file. Raises: OSError."""
    digest, size = hashlib.sha256(), 0
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
    return FileDigest(size, digest.hexdigest())


class HashedFile:
    """A new file, hashed by a thread while it is written, and fsynced when it is closed.

    The thread reads the writer's own memory: hashlib, write and fsync all release the GIL.

    Args:
        hashed: False leaves the hash out.
    """

    def __init__(self, path: Path, hashed: bool = True) -> None:
        self.error: OSError | None = None
        """The first error of a write, which torch.save replaces with one of its own."""
        self._file = path.open("wb", buffering=0)
        self._size = 0
        self._stable: np.ndarray | None = None
        self._to_hash: SimpleQueue[Buffer | None] = SimpleQueue()
        self._digest = in_background(self._hash) if hashed else None

    def expect(self, stable: np.ndarray) -> None:
        """Announce memory that does not change until the file is closed: it is hashed uncopied."""
        self._stable = stable

    def write(self, data: Buffer) -> int:
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
        if self._digest is not None and done:
            self._to_hash.put(self._announced(view) or bytes(view))
        return done

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._size

    def flush(self) -> None:
        """Do nothing, as nothing is buffered; torch.save asks for it."""

    def close(self) -> FileDigest:
        """Fsync and close the file; return its digest, with an empty hash where `hashed` is False.

        Raises: OSError.
        """
        self._to_hash.put(None)
        try:
            os.fsync(self._file.fileno())
            return FileDigest(self._size, self._digest.result() if self._digest else "")
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close the file without fsync, if it is still open."""
        self._to_hash.put(None)
        self._file.close()

    def _announced(self, view: memoryview) -> memoryview | None:
        """Return the announced memory if it is these bytes: unlike the view it keeps them alive."""
        stable = self._stable
        if stable is None or len(view) != stable.nbytes:
            return None
        is_same = np.frombuffer(view, np.uint8).ctypes.data == stable.ctypes.data
        return stable.data if is_same else None

    def _hash(self) -> str:
        digest = hashlib.sha256()
        while (data := self._to_hash.get()) is not None:
            digest.update(data)
        return digest.hexdigest()


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
