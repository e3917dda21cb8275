"""Rank 0 acts and prints for all, and its errors are everybody's."""

from __future__ import annotations

import os

import pytest

from megatron_coe.utils.ranks import call_on_rank_0, is_local_rank_0, is_rank_0, log_rank_0
from tests.distributed.launch import launch


def fail_with(error: Exception) -> object:
    raise error


def outcomes() -> list[object]:
    """What a rank sees of a call that succeeds and of two that fail, with the process that ran."""
    found: list[object] = [is_rank_0(), is_local_rank_0(), call_on_rank_0(os.getpid) == os.getpid()]
    for error in (ValueError("train.lr=0"), OSError(28, "No space left on device", "/file")):
        with pytest.raises(type(error)) as raised:
            call_on_rank_0(lambda error=error: fail_with(error))
        found += [str(raised.value), getattr(raised.value, "filename", None)]
    log_rank_0("once")
    return found


def test_every_rank_gets_the_result_or_the_error_of_rank_0():
    errors = ["train.lr=0", None, "[Errno 28] No space left on device: '/file'", "/file"]
    first, second = launch("tests.unit.utils.test_ranks:outcomes", 2)
    assert first == [True, True, True, *errors]
    assert second == [False, False, False, *errors]


def test_a_process_alone_is_rank_0_and_prints_on_stderr(capsys, monkeypatch):
    assert call_on_rank_0(lambda: 3) == 3
    log_rank_0("said")
    monkeypatch.setenv("RANK", "1")
    assert not is_rank_0()
    log_rank_0("not said")
    assert capsys.readouterr() == ("", "said\n")
