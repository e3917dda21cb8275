"""Files that outlast a power cut, and their SHA-256 computed while the disk is busy.

A file's content is on the disk after its own fsync, its name after that of its folder: a rename is
durable only then.
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

Buffer = bytes | memoryview | np.ndarray
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class FileDigest:
    """What a manifest says about a file."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> FileDigest:
    """Write a small file and fsync it (not its name)."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileDigest(len(content), hashlib.sha256(content).hexdigest())


def replace_file(path: Path, content: bytes) -> None:
    """Replace a small file at once, durably: there is the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    write_file(temporary, content)
    temporary.replace(path)
    sync(path.parent)


def digest_of(path: Path) -> FileDigest:
    """Size and SHA-256 of a file that is there."""
    digest, size = hashlib.sha256(), 0
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
    return FileDigest(size, digest.hexdigest())


class HashedFile:
    """A new file, hashed while it is written and fsynced.

    A thread hashes out of the writer's own memory while the disk is busy: hashlib, write and fsync
    all release the GIL.

    Args:
        hashed: False leaves the hash out.
    """

    def __init__(self, path: Path, hashed: bool = True) -> None:
        self.error: OSError | None = None
        """The first error of a write: torch.save hides it behind one of its own."""
        self._file = path.open("wb", buffering=0)
        self._size = 0
        self._steady: np.ndarray | None = None
        self._to_hash: SimpleQueue[Buffer | None] = SimpleQueue()
        self._digest = in_background(self._hash) if hashed else None

    def expect(self, steady: np.ndarray) -> None:
        """Announce memory that stays as it is until the file is closed; no copy is made of it."""
        self._steady = steady

    def write(self, data: Buffer) -> int:
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
            self._to_hash.put(self._steady if self._is_steady(view) else bytes(view))
        return done

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> FileDigest:
        """Fsync, and the digests; the hash is empty where none was wanted."""
        self._to_hash.put(None)
        try:
            os.fsync(self._file.fileno())
            return FileDigest(self._size, self._digest.result() if self._digest else "")
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close the file if it is not closed."""
        self._to_hash.put(None)
        self._file.close()

    def _is_steady(self, view: memoryview) -> bool:
        """Whether the bytes are those of the memory announced, to their last."""
        steady = self._steady
        if steady is None or len(view) != steady.nbytes:
            return False
        return np.frombuffer(view, np.uint8).ctypes.data == steady.ctypes.data

    def _hash(self) -> str:
        digest = hashlib.sha256()
        while (data := self._to_hash.get()) is not None:
            digest.update(data)
        return digest.hexdigest()


def in_background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Call a function in a thread that does not keep a process from ending."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=call, daemon=True).start()
    return future
