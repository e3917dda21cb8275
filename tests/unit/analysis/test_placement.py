"""Placements of experts: planted groups, an exhaustive search, and what is measured on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_coe.analysis import placement
from megatron_coe.analysis.collect import Routing

T, S = 4000, 20
SEQUENCES = np.repeat(np.arange(T // S), S)


def grouped(experts: int, groups: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choices of two iterations within hidden groups, and the group of each expert."""
    generator = np.random.default_rng(seed)
    group_N = generator.permutation(np.arange(experts) % groups)
    of_group = [np.flatnonzero(group_N == group) for group in range(groups)]
    first = generator.integers(0, experts, T)
    second = np.array([generator.choice(of_group[group_N[expert]]) for expert in first])
    return np.stack([first, second])[..., None], group_N


def by_hand(indices_CTK: np.ndarray, order: list[int], ep: int) -> float:
    """Share of pairs of a token's experts on one rank, token by token."""
    rank = {expert: place * ep // len(order) for place, expert in enumerate(order)}
    same = pairs = 0
    for one, other in itertools.pairwise(indices_CTK):
        for mine, theirs in zip(one, other, strict=True):
            for a, b in itertools.product(mine, theirs):
                same += rank[a] == rank[b]
                pairs += 1
    return same / pairs


def test_hidden_groups_are_found():
    indices, group_N = grouped(24, 4, seed=1)
    routing = Routing("it", 24, (3,), indices[None], np.ones((1, *indices.shape)))
    found = {one.ep: one for one in placement.place_experts(routing, SEQUENCES)}
    assert sorted(found) == [2, 3, 4, 6, 8, 12, 24]
    one = found[4]
    assert {len(set(group_N[list(rank)])) for rank in np.split(np.array(one.order), 4)} == {1}
    assert (one.layer, one.placed, one.fitted) == (3, 1, 1)
    assert one.identity < 0.5
    assert found[2].placed == 1  # two groups to a rank
    assert all(one.fitted >= one.identity - 0.05 for one in found.values())
    assert sorted(one.order) == list(range(24))


def test_shares_are_measured_on_the_other_sequences():
    """A model that routes odd sequences otherwise: what was found says nothing of them."""
    planted, _ = grouped(12, 3, seed=2)
    other = np.random.default_rng(3).integers(0, 12, planted.shape)
    indices = np.where((SEQUENCES % 2 == 0)[:, None], planted, other)
    routing = Routing("it", 12, (1,), indices[None], np.ones((1, *indices.shape)))
    one = next(p for p in placement.place_experts(routing, SEQUENCES) if p.ep == 3)
    assert one.fitted == 1
    assert one.placed == pytest.approx(1 / 3, abs=0.05)
    odd = indices[:, SEQUENCES % 2 == 1]
    assert one.placed == pytest.approx(by_hand(odd, list(one.order), 3))
    assert one.identity == pytest.approx(by_hand(odd, list(range(12)), 3))
    of_ranks = [np.isin(odd, one.order[rank * 4 : rank * 4 + 4]).sum() for rank in range(3)]
    assert one.placed_load == pytest.approx(max(of_ranks) / (odd.size / 3))


def test_the_best_of_all_orders_is_found():
    generator = np.random.default_rng(4)
    for ep in (2, 3):
        indices = generator.integers(0, 6, (3, 60, 2))
        matrix = placement.affinity(indices, 6)
        everything = max(
            by_hand(indices, list(order), ep) for order in itertools.permutations(range(6))
        )
        order = placement.best_order(matrix, ep)
        assert by_hand(indices, list(order), ep) == pytest.approx(everything)
        assert placement.same_rank_share(matrix, order, ep) == pytest.approx(everything)


def test_a_placement_is_never_worse_than_none():
    matrix = np.kron(np.eye(4, dtype=int), np.ones((8, 8), dtype=int))
    assert placement.same_rank_share(matrix, placement.best_order(matrix, 4), 4) == 1


def test_what_cannot_be_placed_is_refused():
    one = Routing("moe", 6, (1,), np.zeros((1, 1, T, 1), int), np.ones((1, 1, T, 1)))
    with pytest.raises(ValueError, match="moe: has one iteration"):
        placement.place_experts(one, SEQUENCES)
    two = Routing("coe", 6, (1,), np.zeros((1, 2, T, 1), int), np.ones((1, 2, T, 1)))
    with pytest.raises(ValueError, match="--tokens"):
        placement.place_experts(two, np.zeros(T, int))
