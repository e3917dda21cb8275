"""A manifest notices every byte that differs, in itself too."""

from __future__ import annotations

import json
import sys

import pytest

from megatron_coe.checkpoint.errors import BadCheckpointError
from megatron_coe.checkpoint.manifest import (
    MANIFEST_FILE,
    digest_folder,
    read_manifest,
    unlisted,
    verify_files,
    write_manifest,
)
from megatron_coe.utils.fsynced import ALGORITHMS, DIGEST, FileDigest, digest_of
from megatron_coe.utils.imports import missing_package

LARGE = bytes(range(256)) * 8192
DIGESTS = {
    "sha256": "91d3beb88a9b2f778a6c44a1c53b63d3c79931845a9aef84b3fb414610bd1938",
    "xxh3_128": "9642747033cb89f24bfa3fa74832e9d0",
}
"""Of LARGE: what was written once is always verified."""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "large").write_bytes(LARGE)
    (tmp_path / "small").write_bytes(b"content")
    (tmp_path / "empty").write_bytes(b"")
    write_manifest(tmp_path, 7, digest_folder(tmp_path))
    return tmp_path


def test_what_was_written_is_good(folder):
    manifest = read_manifest(folder)
    assert manifest.step == 7
    assert sorted(manifest.files) == ["empty", "large", "small"]
    verify_files(folder, manifest)


@pytest.mark.parametrize("name", ["large", "small"])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_bit_is_noticed(folder, name, place):
    content = bytearray((folder / name).read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BadCheckpointError, match=f"{ALGORITHMS[DIGEST]} of {name} is not"):
        verify_files(folder, read_manifest(folder))


def test_every_flipped_bit_of_the_manifest_is_noticed(folder):
    path = folder / MANIFEST_FILE
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        forged = bytearray(content)
        forged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(forged)
        try:
            manifest = read_manifest(folder)
            verify_files(folder, manifest)
        except BadCheckpointError:
            continue
        assert manifest.step != 7, f"bit {bit}"  # the state's own step is compared with it


@pytest.mark.parametrize("name", ["__9_0.distcp", "more.pt", ".metadata.old"])
def test_what_passes_for_data_must_be_listed(folder, name):
    manifest = read_manifest(folder)
    (folder / "notes.txt").write_text("somebody's")
    (folder / "notes").mkdir()
    verify_files(folder, manifest)
    assert unlisted(folder, manifest) == ["notes", "notes.txt"]
    (folder / name).write_text("")
    with pytest.raises(BadCheckpointError, match=f"does not list {name}"):
        verify_files(folder, manifest, part=1, parts=2)


def test_length_and_absence_are_noticed(folder):
    manifest = read_manifest(folder)
    (folder / "empty").write_bytes(b"x")
    with pytest.raises(BadCheckpointError, match=r"empty has 1 bytes, manifest\.json says 0"):
        verify_files(folder, manifest)
    (folder / "empty").unlink()
    with pytest.raises(BadCheckpointError, match="empty is missing"):
        verify_files(folder, manifest)


def test_the_parts_together_read_everything(folder):
    manifest = read_manifest(folder)
    content = bytearray((folder / "small").read_bytes())
    content[0] ^= 1
    (folder / "small").write_bytes(content)
    noticed = []
    for part in range(2):
        try:
            verify_files(folder, manifest, part, 2)
        except BadCheckpointError:
            noticed.append(part)
    assert len(noticed) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"files": {}}',
        '{"step": 1, "files": []}',
        '{"step": 1, "files": {"a": {}}}',
        '{"step": "1", "files": {}}',
        '{"step": 1, "files": {"../a": {"size": 1, "sha256": ""}}}',
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_nonsense_is_no_manifest(folder, text):
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(BadCheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(folder)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return
    (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    with pytest.raises(BadCheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_manifest_names_its_digest(folder, algorithm):
    """Those of version 0.1.0 have SHA-256."""
    if algorithm != "sha256":
        pytest.importorskip("xxhash")
    files = {"large": digest_of(folder / "large", algorithm)}
    for name in ("small", "empty"):
        (folder / name).unlink()
    write_manifest(folder, 7, files)
    text = (folder / MANIFEST_FILE).read_text()
    assert json.loads(text)["files"]["large"] == {"size": len(LARGE), algorithm: DIGESTS[algorithm]}
    manifest = read_manifest(folder)
    assert manifest.files == files
    verify_files(folder, manifest)
    (folder / "large").write_bytes(bytes(len(LARGE)))
    with pytest.raises(BadCheckpointError, match=f"the {ALGORITHMS[algorithm]} of large is not"):
        verify_files(folder, manifest)
    (folder / MANIFEST_FILE).write_text(text.replace(algorithm, "sha3_256"))
    with pytest.raises(BadCheckpointError, match=r"names the digest 'sha3_256', which"):
        read_manifest(folder)


def test_a_missing_package_makes_no_checkpoint_bad(folder, monkeypatch):
    """An older one would be resumed from, as if this were damaged."""
    large = FileDigest(len(LARGE), DIGESTS["xxh3_128"], "xxh3_128")
    write_manifest(folder, 7, digest_folder(folder) | {"large": large})
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(ModuleNotFoundError) as stopped:
        verify_files(folder, read_manifest(folder))
    assert "`pip install xxhash`" in str(missing_package(stopped.value))


def test_without_a_manifest_the_fix_is_named(tmp_path):
    with pytest.raises(BadCheckpointError, match=r"checkpoint\.verify=false"):
        read_manifest(tmp_path)
