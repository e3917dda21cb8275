"""Mutual information by its definition, and null hypotheses that hold or do not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_coe.analysis.mutual_information import (
    MutualInformation,
    any_token,
    mutual_information,
    permutation_test,
    same_label,
    shifted,
)

N, T, PERMUTATIONS = 6, 600, 99


def test_information_by_its_definition():
    table = np.random.default_rng(0).integers(0, 4, (5, 8))
    q = table / table.sum()
    rows, columns = q.sum(axis=1), q.sum(axis=0)
    expected = sum(
        q[i, j] * math.log(q[i, j] / (rows[i] * columns[j])) for i, j in np.argwhere(q > 0)
    )
    assert mutual_information(table) == pytest.approx(expected)
    assert mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-12)


def measure(first, second, shuffle, seed=0) -> MutualInformation:
    generator = np.random.default_rng(seed)
    return permutation_test(first, second, (N, N), shuffle, PERMUTATIONS, generator)


def test_a_permutation_of_experts_tells_all():
    """Each expert is followed by one other: the information is the usage's entropy, log N."""
    generator = np.random.default_rng(1)
    first = generator.permutation(np.repeat(np.arange(N), T // N))[:, None]
    found = measure(first, generator.permutation(N)[first], any_token(len(first)))
    assert found.information == pytest.approx(math.log(N))
    assert found.p == 1 / (1 + PERMUTATIONS)
    assert found.largest_by_chance < 0.2
    assert found.excess == pytest.approx(math.log(N) - found.by_chance)


def test_p_is_uniform_for_independent_choices():
    """Also for several choices per token, which make the plain estimate's bias larger."""
    generator = np.random.default_rng(2)

    def draw():
        return np.stack([generator.permutation(N)[:2] for _ in range(100)])

    ps = np.array([measure(draw(), draw(), any_token(100), seed).p for seed in range(100)])
    assert set(np.round(ps * 100)) <= set(range(1, 101))
    # Kolmogorov and Smirnov's statistic: above 0.163 once in a hundred seeds.
    assert np.abs(np.sort(ps) - np.arange(1, 101) / 100).max() < 0.163


def test_the_bias_is_that_of_shuffled_tokens():
    """For large T it is near (N - 1)² / 2T (Miller), with one choice per token."""
    generator = np.random.default_rng(3)
    first, second = generator.integers(0, N, (2, 2000, 1))
    found = measure(first, second, any_token(2000))
    assert found.by_chance == pytest.approx((N - 1) ** 2 / 4000, rel=0.1)
    assert abs(found.excess) < 0.01


def test_runs_deceive_free_shuffles_and_not_shifts():
    """Two independent series that rarely change look dependent unless their order is kept."""
    generator = np.random.default_rng(4)
    rejected = {"any": 0, "shifted": 0}
    for seed in range(40):
        first, second = runs(generator), runs(generator)
        rejected["any"] += measure(first, second, any_token(T), seed).p <= 0.05
        rejected["shifted"] += measure(first, second, shifted(T, 30), seed).p <= 0.05
    assert rejected["any"] == 40
    assert rejected["shifted"] <= 6  # 2 on average


def runs(generator: np.random.Generator) -> np.ndarray:
    """Choices [T, 1] that change with probability 1/5."""
    number = (generator.random(T) < 1 / 5).cumsum()
    return generator.integers(0, N, T)[number][:, None]


def test_a_common_label_explains_what_depends_on_it_alone():
    """Both sides look at the token's id and at chance: within an id nothing is left."""
    generator = np.random.default_rng(5)
    label = generator.integers(0, 10, T)

    def draw():
        return ((label + generator.integers(0, 2, T)) % N)[:, None]

    first, second = draw(), draw()
    assert measure(first, second, any_token(T)).p == 1 / (1 + PERMUTATIONS)
    assert measure(first, second, same_label(label)).p > 0.05
    # What goes beyond the label shows all the same.
    assert measure(first, first, same_label(label)).p == 1 / (1 + PERMUTATIONS)


def test_shuffles_do_what_they_say():
    generator = np.random.default_rng(6)
    label = generator.integers(0, 5, 50)
    seen = set()
    for _ in range(30):
        order = same_label(label)(generator)
        assert sorted(order) == list(range(50))
        assert np.array_equal(label[order], label)
        seen.add(tuple(order))
        moved = shifted(50, 20)(generator)
        offset = (50 - moved[0]) % 50
        assert 20 <= offset <= 30
        assert np.array_equal(moved, (np.arange(50) + moved[0]) % 50)
        assert sorted(any_token(50)(generator)) == list(range(50))
    assert len(seen) == 30
    with pytest.raises(ValueError, match="use more text"):
        shifted(50, 26)
