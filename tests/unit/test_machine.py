"""What a run writes down of where it ran."""

from __future__ import annotations

import subprocess

import pytest
import torch

from megatron_coe.machine import MACHINE_FILE, commit, read_machine, write_machine


def test_it_is_read_as_it_was_written(tmp_path) -> None:
    assert read_machine(tmp_path) == {}
    write_machine(tmp_path, torch.device("cpu"), ranks=6)
    found = read_machine(tmp_path)
    assert found["ranks"] == 6 and found["torch"] == torch.__version__
    assert {"platform", "processor", "cores", "memory_bytes", "python", "commit"} <= found.keys()
    assert [path.name for path in tmp_path.iterdir()] == [MACHINE_FILE]


@pytest.mark.parametrize("content", ["", "[1]", '{"cores": ', "[" * 100_000])
def test_a_broken_file_is_named(tmp_path, content: str) -> None:
    (tmp_path / MACHINE_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"machine\.json is no JSON object"):
        read_machine(tmp_path)


def test_the_commit_is_this_checkouts(tmp_path) -> None:
    def git(*arguments: str) -> str:
        ours = ("-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path))
        done = subprocess.run(
            ["git", *ours, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("a")
    assert commit(tmp_path / "inner") == "unknown"
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    name = git("rev-parse", "--short", "HEAD")
    assert commit(tmp_path) == name
    assert commit(tmp_path / "inner") == "unknown", "a folder within another's checkout"
    (tmp_path / "inner" / "file").write_text("b")
    assert commit(tmp_path) == name + "+"
