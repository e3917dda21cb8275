"""Files are fsynced, hashed as they lie on the disk, and fail with an error."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch

from megatron_coe.utils.fsynced import (
    FileDigest,
    HashedFile,
    digest_of,
    in_background,
    replace_fsynced,
    write_fsynced,
)


def test_the_digest_is_that_of_the_bytes_on_disk(tmp_path):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator) for size in (3, 100_000, 1_500_000)]
    tensors.append(torch.zeros(0))
    file = HashedFile(tmp_path / "file")
    for tensor in tensors:
        torch.save(tensor, file)
    file.write(b"end")
    assert file.tell() == (tmp_path / "file").stat().st_size
    digests = file.close()
    content = (tmp_path / "file").read_bytes()
    assert digests == digest_of(tmp_path / "file")
    sha256 = hashlib.sha256(content).hexdigest()
    assert digest_of(tmp_path / "file", "sha256") == FileDigest(len(content), sha256, "sha256")


def test_without_hash_there_is_none(tmp_path):
    file = HashedFile(tmp_path / "file", hashed=False)
    file.write(b"abc")
    assert file.close() == FileDigest(3, "")


def test_a_full_disk_is_an_os_error_even_through_torch():
    """torch.save says that something is wrong with its archive; what it was is kept."""
    file = HashedFile(Path("/dev/full"))
    with pytest.raises(Exception):  # noqa: B017 (torch's own error, whatever it is)
        torch.save(torch.ones(100), file)
    assert file.error is not None
    assert file.error.errno == errno.ENOSPC
    file.abandon()


def test_a_file_is_replaced_at_once(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    replace_fsynced(path, b"one")
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(real(descriptor)))
    replace_fsynced(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]
    assert len(synced) == 2, "the content, then the name"


def test_a_small_file_has_its_digest(tmp_path):
    assert write_fsynced(tmp_path / "small", b"content") == digest_of(tmp_path / "small")


def test_an_error_in_the_background_comes_back():
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0).result()
    assert in_background(max, 3, 5).result() == 5
