"""The launcher itself: a failing or hanging rank must fail the test, and leave no process."""

from __future__ import annotations

import os
import time

import pytest

from tests.distributed.launch import RankError, launch

HERE = "tests.distributed.test_launch"


def fail_on_rank_1(_: str) -> None:
    import torch

    if torch.distributed.get_rank() == 1:
        raise ValueError("rank 1 has had enough")
    torch.distributed.barrier()


def hang(directory: str) -> None:
    with open(os.path.join(directory, os.environ["RANK"]), "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


def test_a_rank_that_raises_is_reported_with_its_traceback(tmp_path):
    with pytest.raises(RankError, match=r"rank 1 raised(?s:.*)fail_on_rank_1(?s:.*)had enough"):
        launch(f"{HERE}:fail_on_rank_1", 2, str(tmp_path))


def test_a_rank_that_hangs_is_ended(tmp_path):
    with pytest.raises(RankError, match="rank 0 gave no result"):
        launch(f"{HERE}:hang", 1, str(tmp_path), timeout_s=4)
    # A busy machine may not have come as far as writing its number.
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
