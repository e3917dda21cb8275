"""`manifest.json`: the size and digest of every other file of a checkpoint, and its step.

    {"files": {"__0_0.distcp": {"size": 1048576, "xxh3_128": "…"}, …}, "step": 100}

The digest's key is its algorithm: checkpoints of version 0.1.0 have `sha256`. The manifest is the
last file to be written, and has one valid spelling: any byte that differs, in it or in the files
that it lists, is detected.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megatron_coe.checkpoint.errors import BadCheckpointError
from megatron_coe.utils.fsynced import ALGORITHMS, FileDigest, digest_of, fsync, write_fsynced
from megatron_coe.utils.run_files import HF_FOLDER, TOKENIZER_FOLDER, TOKENIZER_MODEL

MANIFEST_FILE = "manifest.json"
_FOLDERS = (TOKENIZER_FOLDER, HF_FOLDER)
"""The only folders in a checkpoint; their files are listed as `tokenizer/tokenizer.json`."""


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint, and its step."""

    step: int
    files: Mapping[str, FileDigest]

    def text(self) -> str:
        """Return the content of the manifest's file."""
        files = {n: {"size": f.size, f.algorithm: f.value} for n, f in self.files.items()}
        content = {"step": self.step, "files": files}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"


def write_manifest(folder: Path, step: int, files: Mapping[str, FileDigest]) -> None:
    """Write a checkpoint's manifest and fsync it. Raises: OSError."""
    write_fsynced(folder / MANIFEST_FILE, Manifest(step, files).text().encode())


def digest_folder(folder: Path) -> dict[str, FileDigest]:
    """Hash every file of a checkpoint except its manifest. Raises: OSError."""
    return {
        name: digest_of(folder / name)
        for name in _names(folder)
        if (folder / name).is_file() and name != MANIFEST_FILE
    }


def add_manifest(folder: Path, step: int) -> None:
    """Hash and fsync a checkpoint that has no manifest, and write one: its content is trusted.

    Raises: BadCheckpointError if it has one; OSError.
    """
    if (folder / MANIFEST_FILE).exists():
        raise BadCheckpointError(f"{MANIFEST_FILE} is there already: remove it to overrule it")
    files = digest_folder(folder)
    for name in files:
        fsync(folder / name)
    for inner in _FOLDERS:
        if (folder / inner).is_dir():
            fsync(folder / inner)
    write_manifest(folder, step, files)
    fsync(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises: BadCheckpointError if there is none, or it is not as `write_manifest` wrote it.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        files = {name: _read_digest(**entry) for name, entry in content["files"].items()}
        manifest = Manifest(content["step"], files)
    except BadCheckpointError:
        raise
    except FileNotFoundError as error:
        raise BadCheckpointError(
            f"{MANIFEST_FILE} is missing, so that nothing in it can be verified; if it was written "
            "by an earlier version or with checkpoint.verify=false and you trust it, load it with "
            "checkpoint.verify=false, or let coe verify --write-manifest write one"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadCheckpointError(f"{MANIFEST_FILE} is damaged") from error
    plain = all(
        type(digests.size) is int and type(digests.value) is str and _is_plain(name)
        for name, digests in files.items()
    )
    if not plain or type(manifest.step) is not int or manifest.text() != text:
        raise BadCheckpointError(f"{MANIFEST_FILE} is damaged")
    return manifest


def _read_digest(size: int, **digest: str) -> FileDigest:
    """Read a file's entry. Raises: BadCheckpointError for an algorithm that is not known."""
    ((algorithm, value),) = digest.items()
    if algorithm not in ALGORITHMS:
        raise BadCheckpointError(
            f"{MANIFEST_FILE} names the digest {algorithm!r}, which this version does not know"
        )
    return FileDigest(size, value, algorithm)


def unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """Return the names in a folder that its manifest does not list."""
    known = {MANIFEST_FILE, *manifest.files}
    return [name for name in _names(folder) if name not in known]


def _names(folder: Path) -> list[str]:
    """Return the names in a checkpoint; of its own folders, those of the files in them."""
    names = []
    for path in folder.iterdir():
        if path.is_dir() and path.name in _FOLDERS:
            inside = (file for file in path.rglob("*") if file.is_file())
            names += [file.relative_to(folder).as_posix() for file in inside]
        else:
            names.append(path.name)
    return sorted(names)


def _is_plain(name: str) -> bool:
    """Return whether a name leads to a file of a checkpoint and nowhere else."""
    path = PurePosixPath(name)
    is_inside = str(path) == name and ".." not in path.parts and not path.is_absolute()
    return is_inside and (len(path.parts) == 1 or name.partition("/")[0] in _FOLDERS)


def _could_be_read(name: str) -> bool:
    """Return whether a file passes for a checkpoint's: its data, or what lies beside it."""
    is_carried = name == TOKENIZER_MODEL or name.partition("/")[0] in _FOLDERS
    return is_carried or name.endswith((".distcp", ".pt")) or name.startswith(".metadata")


def verify_files(
    folder: Path,
    manifest: Manifest,
    part: int = 0,
    parts: int = 1,
    in_every_part: Collection[str] = (),
) -> None:
    """Compare files with a manifest: all sizes, and the hashes of every `parts`-th file.

    Files are dealt out by size, so that ranks that share the work read about as much each. A file
    that is not listed must not look like one of the checkpoint's.

    Args:
        part, parts: compare the hashes of this part of `parts`.
        in_every_part: files that every part compares, because every rank reads them.

    Raises: BadCheckpointError naming the first file that differs.
    """
    for name in filter(_could_be_read, unlisted(folder, manifest)):
        raise BadCheckpointError(
            f"{MANIFEST_FILE} does not list {name}, which passes for a part of the checkpoint: "
            "move it away"
        )
    check_sizes(folder, manifest)
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    for name in {*by_size[part::parts], *in_every_part} & manifest.files.keys():
        expected = manifest.files[name]
        if digest_of(folder / name, expected.algorithm) != expected:
            raise BadCheckpointError(
                f"the {ALGORITHMS[expected.algorithm]} of {name} is not the one in "
                f"{MANIFEST_FILE}: the content has changed"
            )


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compare the sizes of files with a manifest.

    Raises: BadCheckpointError naming the first file that is missing or has another size.
    """
    for name, digests in sorted(manifest.files.items()):
        path = folder / name
        if not path.is_file():
            raise BadCheckpointError(f"{name} is missing")
        if (size := path.stat().st_size) != digests.size:
            raise BadCheckpointError(
                f"{name} has {size} bytes, {MANIFEST_FILE} says {digests.size}"
            )
