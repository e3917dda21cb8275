"""Three resumes in a row end bitwise where the uninterrupted run does, on all ranks alike.

They are made while the batch size is ramped up, and while the learning rate falls.
"""

from __future__ import annotations

import pytest

from tests.distributed.launch import launch
from tests.distributed.layouts import WORLDS

QUICK = ["TP2·EP2·ETP1·DO·MB4", "PP2·MB4 muon"]  # a quarter of the passes
ALL = WORLDS[4]


def test_three_resumes_of_a_layout(tmp_path):
    function = "tests.distributed.resume:differences"
    for rank in launch(function, 2, str(tmp_path), QUICK, True, timeout_s=600.0):
        assert rank == {layout: [] for layout in QUICK}, "layout: what differs"


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["at_once", "in_the_background"])
@pytest.mark.parametrize("optimizer", ["", "·DO"], ids=["plain", "distributed_optimizer"])
def test_three_resumes_of_every_layout_of_four_ranks(tmp_path, optimizer, asynchronous):
    layouts = [layout + optimizer for layout in ALL]
    function = "tests.distributed.resume:differences"
    for rank in launch(function, 4, str(tmp_path), layouts, asynchronous, timeout_s=3600.0):
        assert rank == {layout: [] for layout in layouts}


def test_ranks_agree_on_failures_and_on_damage(tmp_path):
    ranks = launch("tests.distributed.resume:agreements", 2, str(tmp_path))
    assert ranks[0] == ranks[1]
    *failures, damage_is_noticed = ranks[0]
    for told, *names in failures:
        assert "step_00000002 was not written: rank 1 on " in told
        assert names == ["step_00000001", "step_00000001", "step_00000003 step_00000001"]
    assert damage_is_noticed
