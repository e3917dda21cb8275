"""Memory on paper against what a training step really takes, on two ranks."""

from __future__ import annotations

import pytest

from megatron_coe.planning.memory import Memory
from tests.distributed.launch import launch
from tests.memory import PAIRS, assert_near

CORE = ("TP2 ETP1", "EP2", "PP2 VPP2", "CP2")
REST = tuple(name for name in PAIRS if name not in CORE)


@pytest.mark.parametrize("names", [CORE, pytest.param(REST, marks=pytest.mark.slow)])
def test_predicted_memory_is_what_ranks_take(names: tuple[str, ...]) -> None:
    for results in launch("tests.memory:on_rank", 2, {name: PAIRS[name] for name in names}):
        assert tuple(results) == names
        for predicted, measured in results.values():
            assert_near(Memory(**predicted), Memory(**measured))
