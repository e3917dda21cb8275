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
from threading import Condition, Thread
from typing import ParamSpec, TypeVar

_BLOCK = 1 << 20

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class FileFacts:
    """What a manifest says about a file."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> FileFacts:
    """Write a small file and fsync it (not its name)."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileFacts(len(content), hashlib.sha256(content).hexdigest())


def replace_file(path: Path, content: bytes) -> None:
    """Replace a small file at once, durably: there is the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    write_file(temporary, content)
    temporary.replace(path)
    sync_folder(path.parent)


def facts_of(path: Path) -> FileFacts:
    """Size and SHA-256 of a file that is there."""
    digest, size = hashlib.sha256(), 0
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
    return FileFacts(size, digest.hexdigest())


class HashedFile:
    """A new file, hashed while it is written and fsynced.

    A thread follows the writer through the system's page cache, so that hashing costs no second
    reading of the disk and hides behind its waiting (hashlib and fsync both release the GIL).

    Args:
        hashed: False leaves the hash out.
    """

    def __init__(self, path: Path, hashed: bool = True) -> None:
        self.error: OSError | None = None
        """The first error of a write: torch.save hides it behind one of its own."""
        self._file = path.open("w+b", buffering=0)
        self._written = 0
        self._complete = False
        self._grown = Condition()
        self._facts = in_background(self._follow) if hashed else None

    def write(self, data: memoryview | bytes) -> int:
        view = memoryview(data).cast("B")
        try:
            done = 0
            while done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            self.error = self.error or error
            raise
        self._grow(len(view))
        return len(view)

    def tell(self) -> int:
        return self._written

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> FileFacts:
        """Fsync, and the facts; the hash is empty where none was wanted."""
        self._grow(0, complete=True)
        try:
            os.fsync(self._file.fileno())
            return self._facts.result() if self._facts else FileFacts(self._written, "")
        finally:
            self.abandon()

    def abandon(self) -> None:
        self._grow(0, complete=True)
        if self._facts:
            self._facts.exception()  # the thread reads from the descriptor until it ends
        self._file.close()

    def _grow(self, count: int, complete: bool = False) -> None:
        with self._grown:
            self._written += count
            self._complete |= complete
            self._grown.notify()

    def _follow(self) -> FileFacts:
        digest, offset = hashlib.sha256(), 0
        block = memoryview(bytearray(_BLOCK))
        while True:
            with self._grown:
                self._grown.wait_for(lambda: self._written > offset or self._complete)  # noqa: B023
                end, complete = self._written, self._complete
            while offset < end:
                count = os.preadv(self._file.fileno(), [block[: end - offset]], offset)
                if count == 0:
                    raise OSError(f"{self._file.name} shrank while it was written")
                digest.update(block[:count])
                offset += count
            if complete:
                return FileFacts(offset, digest.hexdigest())


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
