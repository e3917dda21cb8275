"""Files and folders appear under their names when they are complete, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_coe.utils.files import (
    atomic_folder,
    atomic_path,
    check_writable,
    give_default_mode,
    naming_errors,
)


def test_a_file_is_replaced_on_success_alone(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("two")
        raise KeyError
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_named_on_success_alone(tmp_path):
    with pytest.raises(KeyError), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").touch()
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [
        Path("folder"),
        Path("folder/file"),
    ]


def test_an_error_names_the_file_and_the_fix():
    with (
        pytest.raises(OSError, match=r"cannot write /x/y: No space left on device; free some"),
        naming_errors(Path("/x/y"), "free some"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="cannot write /dev/null/x"), atomic_path(Path("/dev/null/x")):
        pass


def test_what_cannot_be_written_is_refused_before_and_nothing_is_created(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(NotADirectoryError, match="file is no folder"):
        check_writable(tmp_path / "file" / "deep" / "x")
    check_writable(tmp_path / "deep" / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_private_file_gets_the_mode_of_a_new_one(tmp_path):
    private, usual = tmp_path / "private", tmp_path / "usual"
    private.touch(mode=0o600)
    usual.touch()
    give_default_mode(private)
    assert private.stat().st_mode == usual.stat().st_mode
    assert len(list(tmp_path.iterdir())) == 2
