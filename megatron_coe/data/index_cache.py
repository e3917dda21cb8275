"""Megatron's index files: named when they are whole, and read only as they were written.

Megatron 0.16.1 writes the index of a data set (which sample stands where) file by file under the
final names, and later takes whatever it finds there: half a file, or a pickle, which it would run
(`numpy.load` with `allow_pickle`, blended_dataset.py and gpt_dataset.py). Here every data set, in
every use, has a folder of its own, which is

    made        by one rank, under another name, and renamed when it is complete and sealed;
    checked     against its seal (size and SHA-256 of every file) before Megatron opens it, and made
                anew, with a word about it, when it differs: nothing is to be deleted by hand;
    shared      by the ranks of a run, and by runs at the same time: whoever comes second to the
                renaming takes what is there.
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

SEAL = "sha256.json"
_ABANDONED_S = 24 * 3600
"""An unfinished folder that nobody has touched for so long is of a run that was killed."""


def prepare(folder: Path, make: Callable[[Path], object]) -> None:
    """See to it that `folder` holds a good index. With torch.distributed a collective of all ranks.

    Args:
        make: writes the index files into a folder, by itself (no collective); called on rank 0, and
            only if there is no good index.

    Raises: OSError on every rank when it cannot be written; ValueError when `make` does.
    """
    call_on_rank_0(lambda: _prepare_alone(folder, make))


def fault(folder: Path) -> str | None:
    """What is wrong with an index, in words that name the file; None if it is good."""
    try:
        sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        files = {path.name: path for path in folder.iterdir() if path.name != SEAL}
        if not isinstance(sealed, dict) or sealed.keys() != files.keys():
            return "holds other files than its seal names"
        for name, path in files.items():
            if path.is_symlink() or not path.is_file():
                return f"{name} is no plain file"
            if sealed[name] != _digest(path):
                return f"{name} is not as it was written"
            if path.suffix == ".npy":
                # A seal can be forged: a file of objects must not reach Megatron in any case.
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
        print(f"index {folder}: {problem}; it is made anew", file=sys.stderr, flush=True)
    partial = partial_path(folder)
    with naming_errors(folder, "data.cache can name another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        try:
            partial.mkdir()
            make(partial)
            _seal(partial)
            _give_name(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _give_name(partial: Path, folder: Path) -> None:
    """Rename, unless another run has put a good index there meanwhile."""
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


def _seal(folder: Path) -> None:
    digests = {path.name: _digest(path) for path in folder.iterdir()}
    with (folder / SEAL).open("w", encoding="utf-8") as file:
        json.dump(digests, file, indent=1, sort_keys=True)


def _digest(path: Path) -> list[int | str]:
    """Return size and SHA-256 of a file."""
    digest = digest_of(path)
    return [digest.size, digest.sha256]


def _remove_abandoned(folder: Path) -> None:
    for path in folder.parent.glob(f".{folder.name}.partial-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path)
