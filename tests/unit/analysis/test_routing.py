"""Measures of routing against loops over tokens that follow the definitions to the letter."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from megatron_coe.analysis.routing import (
    chance_overlap,
    coactivation,
    divergence,
    entropy,
    expert_counts,
    local_consistency,
    overlap,
    transition,
)
from megatron_coe.model.moe.load_stats import load_stats

N, K, T = 7, 3, 60


@pytest.fixture(params=range(3))
def generator(request) -> np.random.Generator:
    return np.random.default_rng(request.param)


def draw(generator: np.random.Generator, tokens: int = T, uneven: bool = True) -> np.ndarray:
    """Choices [T, K], some experts likelier than others, one never chosen."""
    weights = np.arange(N, dtype=float) if uneven else np.ones(N)
    return np.stack(
        [generator.choice(N, K, replace=False, p=weights / weights.sum()) for _ in range(tokens)]
    )


def plain_entropy(shares) -> float:
    return -sum(share * math.log(share) for share in shares if share)


def test_usage_by_its_definition(generator):
    choices = draw(generator)
    counts = expert_counts(choices, N)
    counted = Counter(choices.flatten().tolist())
    assert counts.tolist() == [counted[i] for i in range(N)]
    found = load_stats(counts)
    shares = [counted[i] / (T * K) for i in range(N)]
    assert found.entropy == pytest.approx(plain_entropy(shares) / math.log(N))
    assert found.max_over_mean == pytest.approx(max(shares) * N)
    assert found.dead == sum(share == 0 for share in shares) >= 1


def test_usage_at_its_ends():
    even, single = load_stats(np.full(5, 3)), load_stats(np.array([0, 9, 0]))
    assert (even.entropy, even.max_over_mean, even.dead) == (pytest.approx(1), 1, 0)
    assert (single.entropy, single.max_over_mean, single.dead) == (pytest.approx(0), 3, 2)


def test_coactivation_counts_every_pair_of_experts_of_a_token(generator):
    first, second = draw(generator), draw(generator)
    expected = np.zeros((N, N), dtype=int)
    for before, after in zip(first, second, strict=True):
        for i, j in itertools.product(before, after):
            expected[i, j] += 1
    matrix = coactivation(first, second, N)
    assert np.array_equal(matrix, expected)
    assert matrix.sum() == T * K * K
    assert np.array_equal(coactivation(second, first, N), matrix.T)


def test_transition_by_its_definition(generator):
    matrix = coactivation(draw(generator), draw(generator), N)
    found = transition(matrix)
    q = matrix / matrix.sum()
    p, p_after = q.sum(axis=1), q.sum(axis=0)
    given = sum(p[i] * plain_entropy(q[i] / p[i]) for i in range(N) if p[i])
    assert found.entropy == pytest.approx(given / math.log(N))
    differences = [abs(q[i, j] - q[j, i]) for i in range(N) for j in range(N)]
    assert found.asymmetry == pytest.approx(sum(differences) / 2)
    assert found.diagonal == pytest.approx(sum(q[i, i] for i in range(N)))
    assert found.diagonal_by_chance == pytest.approx(sum(p[i] * p_after[i] for i in range(N)))
    largest = sorted(q.flatten(), reverse=True)[: N * N // 10]
    assert found.top_tenth == pytest.approx(sum(largest))


@pytest.mark.parametrize("shift", [0, 1])
def test_transition_of_a_planted_permutation(generator, shift):
    """Expert i leads to i + shift: nothing is open, all or nothing is on the diagonal."""
    first = generator.integers(0, N, (T, 1))
    found = transition(coactivation(first, (first + shift) % N, N))
    assert found.entropy == pytest.approx(0, abs=1e-12)
    assert found.diagonal == (shift == 0)
    assert found.asymmetry == pytest.approx(shift)


def test_overlap_and_its_chance(generator):
    first, second = draw(generator, 20_000), draw(generator, 20_000, uneven=False)
    expected = np.mean(
        [len(set(a) & set(b)) / K for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    )
    assert overlap(first, second) == pytest.approx(expected)
    assert overlap(first, first[:, ::-1]) == 1
    chance = chance_overlap(expert_counts(first, N), expert_counts(second, N), K)
    assert chance == pytest.approx(expected, abs=0.01)  # a deviation of 0.002


@pytest.mark.parametrize("distance", [1, 4])
def test_local_consistency_stays_within_sequences(generator, distance):
    choices = draw(generator)
    sequence = np.sort(generator.integers(0, 6, T))
    shares = [
        len(set(choices[s]) & set(choices[s + distance])) / K
        for s in range(T - distance)
        if sequence[s] == sequence[s + distance]
    ]
    assert local_consistency(choices, sequence, distance) == pytest.approx(np.mean(shares))
    assert math.isnan(local_consistency(choices, np.arange(T), distance))


def test_divergence_by_its_definition(generator):
    first, second = (expert_counts(draw(generator), N) for _ in range(2))
    p, q = first / first.sum(), second / second.sum()
    middle = (p + q) / 2
    parts = [
        sum(a * math.log(a / m) for a, m in zip(one, middle, strict=True) if a) for one in (p, q)
    ]
    assert divergence(first, second) == pytest.approx(sum(parts) / 2)
    assert divergence(first, 2 * first) == pytest.approx(0, abs=1e-12)
    apart = divergence(np.array([3, 1, 0, 0]), np.array([0, 0, 5, 1]))
    assert apart == pytest.approx(math.log(2))


def test_entropy_takes_counts_of_any_shape(generator):
    counts = generator.integers(0, 5, (4, 5))
    assert entropy(counts) == pytest.approx(plain_entropy(counts.flatten() / counts.sum()))
