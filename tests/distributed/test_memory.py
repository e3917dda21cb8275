"""Memory and exchange of tokens on paper against what a training step really does, on two ranks."""

from __future__ import annotations

import pytest

from megatron_coe.planning.memory import Memory
from tests.distributed.launch import launch
from tests.memory import PAIRS, assert_near

CORE = ("TP2 ETP1", "EP2", "PP2 VPP2", "CP2")
REST = tuple(name for name in PAIRS if name not in CORE)


@pytest.mark.parametrize("names", [CORE, pytest.param(REST, marks=pytest.mark.slow)])
def test_the_plan_is_what_ranks_take_and_send(names: tuple[str, ...]) -> None:
    ranks = launch("tests.memory:on_rank", 2, {name: PAIRS[name] for name in names})
    for name in names:
        for rank in ranks:
            predicted, measured = (Memory(**rank[name][of]) for of in ("predicted", "measured"))
            assert_near(predicted, measured, frozen="frozen" in name)
    if "EP2" in names:
        both = [rank["EP2"] for rank in ranks]
        # 4 micro-batches / 2 replicas, 4 layers, 2 iterations: rows and weights to the experts,
        # rows back, and the gradients of the three.
        assert {rank["exchanges"][0] for rank in both} == {2 * 4 * 2 * 6}
        assert {rank["planned_exchanges"][0] for rank in both} == {2 * 4 * 2 * 6}
        # Ranks are not equally loaded, but together they put in every row once, half of it for
        # themselves when experts are equally loaded.
        put_in = sum(rank["exchanges"][1] for rank in both)
        assert sum(rank["planned_exchanges"][1] for rank in both) * 2 == put_in
