"""Names appear and vanish in one step, and what a dead run left incomplete is removed."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_coe.checkpoint import directory as folders
from megatron_coe.checkpoint.directory import (
    check_latest,
    find_checkpoints,
    partial_folder,
    prune,
    publish,
    remove_leftovers,
    restore_replaced,
    update_latest,
)
from megatron_coe.utils.run_files import LATEST_FILE, step_of


def write(folder: Path, step: int, content: str) -> None:
    partial = partial_folder(folder, step)
    partial.mkdir(parents=True)
    (partial / "content").write_text(content)


def put(folder: Path, step: int) -> Path:
    published = publish(folder, step)
    update_latest(published)
    return published


def always(path: Path) -> bool:
    return True


def contents(folder: Path) -> dict[int, str]:
    return {step_of(path): (path / "content").read_text() for path in find_checkpoints(folder)}


def test_names_and_order(tmp_path):
    for step in (5, 100, 20):
        write(tmp_path, step, str(step))
        put(tmp_path, step)
    (tmp_path / "step_00000007").write_text("a file")
    (tmp_path / "step_7").mkdir()
    assert list(contents(tmp_path)) == [100, 20, 5]
    assert (tmp_path / LATEST_FILE).read_text() == "step_00000020\n"
    assert step_of(tmp_path / "step_7") is None


def test_what_cannot_be_deleted_is_told_and_tried_again(tmp_path, monkeypatch):
    """Neither the checkpoints after it nor the next deletions suffer."""
    for step in (1, 2, 3):
        write(tmp_path, step, str(step))
        put(tmp_path, step)

    def refuse(path, ignore_errors=False, **options):
        if not ignore_errors and path.name.endswith("step_00000001"):
            raise PermissionError(13, "Permission denied", str(path / "content"))
        return rmtree(path, ignore_errors, **options)

    rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        for _ in range(2):
            (error,) = prune(tmp_path, 3, keep=1, keep_every=0, is_loadable=always)
            assert error.filename == str(tmp_path / ".removed_step_00000001" / "content")
    assert list(contents(tmp_path)) == [3]
    assert prune(tmp_path, 3, keep=1, keep_every=0, is_loadable=always) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST_FILE, "step_00000003"]


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(1, 0, [6, 5]), (3, 0, [6, 5, 4, 3]), (1, 2, [6, 5, 4, 2]), (9, 0, [6, 5, 4, 3, 2, 1])],
)
def test_which_are_kept(tmp_path, keep, keep_every, left):
    for step in range(1, 7):
        write(tmp_path, step, str(step))
        put(tmp_path, step)
    prune(tmp_path, 5, keep, keep_every, always)  # 6 is of a future that was found bad
    assert list(contents(tmp_path)) == left


@pytest.mark.parametrize(
    ("keep", "keep_every", "loadable", "left"),
    [
        (1, 0, {5}, [6, 5]),
        (2, 0, {5, 2}, [6, 5, 4, 3, 2]),  # neither 4 nor 3 takes the place of 2
        (2, 0, {5, 3, 2}, [6, 5, 4, 3]),
        (2, 2, {5, 3}, [6, 5, 4, 3, 2]),
        (3, 0, {5, 1}, [6, 5, 4, 3, 2, 1]),
        (2, 0, {6, 5, 3}, [6, 5, 4, 3]),  # 6 lies in the future
    ],
)
def test_what_cannot_be_loaded_takes_no_place(tmp_path, keep, keep_every, loadable, left):
    for step in range(1, 7):
        write(tmp_path, step, str(step))
        put(tmp_path, step)
    prune(tmp_path, 5, keep, keep_every, lambda path: step_of(path) in loadable)
    assert list(contents(tmp_path)) == left


class Death(BaseException):
    """Of the process, between two instructions."""


def die_at(monkeypatch, number: int) -> None:
    """The `number`-th change of the disk is the last: the next one does not happen."""
    left = iter(range(number))

    def dying(change):
        def call(*args, **kwargs):
            if next(left, None) is None:
                raise Death
            return change(*args, **kwargs)

        return call

    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(Path, "replace", dying(Path.replace))
    monkeypatch.setattr(os, "unlink", dying(os.unlink))
    monkeypatch.setattr(os, "rmdir", dying(os.rmdir))
    monkeypatch.setattr(os, "fsync", dying(os.fsync))


@pytest.mark.parametrize("number", range(14))
@pytest.mark.parametrize(("earlier", "step"), [((1, 2), 2), ((1, 2), 3), ((2,), 2)])
def test_dying_anywhere_in_a_save_leaves_a_good_folder(
    tmp_path, monkeypatch, number, earlier, step
):
    """Step 2 is replaced, step 3 is new; the next run removes the leftovers and saves again."""
    for before in earlier:
        write(tmp_path, before, "old")
        put(tmp_path, before)
    write(tmp_path, step, "new")
    with monkeypatch.context() as patch, suppress(Death):
        die_at(patch, number)
        put(tmp_path, step)
        prune(tmp_path, step, keep=1, keep_every=0, is_loadable=always)
    restore_replaced(tmp_path)
    found = contents(tmp_path)
    assert found.get(2) == "old" or found.get(step) == "new"
    remove_leftovers(tmp_path)
    assert contents(tmp_path) == found
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    write(tmp_path, 4, "next")
    put(tmp_path, 4)
    assert contents(tmp_path)[4] == "next"


def test_half_a_deletion_is_completed(tmp_path):
    write(tmp_path, 1, "old")
    put(tmp_path, 1).rename(tmp_path / ".removed_step_00000001")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LATEST_FILE]


def test_a_folder_in_the_pointers_place_is_moved_away(tmp_path):
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "file").write_text("somebody's")
    partial_folder(tmp_path, 4).mkdir()
    put(tmp_path, 4)
    assert (tmp_path / "latest").read_text() == "step_00000004\n"
    assert (tmp_path / "latest_before_step_00000004" / "file").read_text() == "somebody's"


def test_a_pointer_that_does_not_fit_is_doubted(tmp_path):
    assert check_latest(tmp_path, []) is None
    for step in (1, 2):
        write(tmp_path, step, "")
        put(tmp_path, step)
    found = find_checkpoints(tmp_path)
    pointer = tmp_path / LATEST_FILE
    assert check_latest(tmp_path, found) is None
    for text in ("", "step_0000", "../step_00000002", "step_00000009\n", "step_00000001\n"):
        pointer.write_text(text)
        assert str(pointer) in check_latest(tmp_path, found)
    pointer.write_bytes(b"\xff\xfe")
    assert str(pointer) in check_latest(tmp_path, found)
    shutil.rmtree(found[0])
    assert folders.check_latest(tmp_path, find_checkpoints(tmp_path))
