"""Megatron's index files: renamed when they are complete, and read only if they are unchanged.

Megatron-Core 0.16.1 writes the index of a dataset (which sample is where) file by file under the
final names, and later reads whatever it finds there: half a file, or a pickle, which it would run
(`numpy.load` with `allow_pickle`, blended_dataset.py and gpt_dataset.py). Here every dataset, in
every use, has a folder of its own, which is

    built       by one rank under another name, and renamed when it is complete and has digests;
    checked     against its digests (size and SHA-256 of every file) before Megatron opens it, and
                rebuilt, with a message, when it differs: nothing has to be deleted by hand;
    shared      by the ranks of a run, and by concurrent runs: the first to rename wins.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_coe.utils.files import naming_errors, partial_path
from megatron_coe.utils.fsynced import digest_of
from megatron_coe.utils.ranks import call_on_rank_0

DIGESTS_FILE = "sha256.json"
_ABANDONED_S = 24 * 3600
"""A partial folder untouched for so long was left by a run that was killed."""


def prepare(folder: Path, make: Callable[[Path], object]) -> None:
    """Prepare a valid index in `folder`; with torch.distributed a collective of all ranks.

    Args:
        make: writes the index files into a folder, without collectives; called on rank 0, and only
            if there is no valid index.

    Raises: OSError on every rank when it cannot be written; ValueError when `make` does.
    """
    call_on_rank_0(lambda: _prepare_alone(folder, make))


def fault(folder: Path) -> str | None:
    """Describe what is wrong with an index, naming the file; None if it is valid."""
    try:
        expected = json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8"))
        files = {path.name: path for path in folder.iterdir() if path.name != DIGESTS_FILE}
        if not isinstance(expected, dict) or expected.keys() != files.keys():
            return f"holds other files than {DIGESTS_FILE} names"
        for name, path in files.items():
            if path.is_symlink() or not path.is_file():
                return f"{name} is no regular file"
            if expected[name] != _digest(path):
                return f"{name} has changed since it was written"
            if path.suffix == ".npy":
                # Digests can be forged: a file of objects must not reach Megatron in any case.
                np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, EOFError, RecursionError) as error:
        return f"is damaged ({error})"
    return None


def _prepare_alone(folder: Path, make: Callable[[Path], object]) -> None:
    if folder.is_dir():
        problem = fault(folder)
        if problem is None:
            return
        print(f"index {folder}: {problem}; rebuilding it", file=sys.stderr, flush=True)
    partial = partial_path(folder)
    with naming_errors(folder, "data.cache can name another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        try:
            partial.mkdir()
            make(partial)
            _write_digests(partial)
            _rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: Path, folder: Path) -> None:
    """Rename, unless another run has put a valid index there meanwhile."""
    with suppress(OSError):  # not empty
        os.rename(partial, folder)
        return
    if fault(folder) is None:
        return
    bad = partial.with_name(f"{partial.name}-bad")
    with suppress(FileNotFoundError):  # another run was as quick
        os.rename(folder, bad)
    shutil.rmtree(bad, ignore_errors=True)
    try:
        os.rename(partial, folder)
    except OSError:
        if fault(folder) is not None:
            raise


def _write_digests(folder: Path) -> None:
    digests = {path.name: _digest(path) for path in folder.iterdir()}
    with (folder / DIGESTS_FILE).open("w", encoding="utf-8") as file:
        json.dump(digests, file, indent=1, sort_keys=True)


def _digest(path: Path) -> list[int | str]:
    """Return size and SHA-256 of a file."""
    digest = digest_of(path, "sha256")
    return [digest.size, digest.value]


def _remove_abandoned(folder: Path) -> None:
    for path in folder.parent.glob(f".{folder.name}.partial-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path)
