"""Ratios of two checkouts' documents."""

from __future__ import annotations

import pytest

from benchmarks.against import PEAK, Comparison, figures_of
from benchmarks.timing import TOTAL, Spread


def document(key: str, seconds: list[float], peak: int) -> dict[str, object]:
    samples = {"moe": {"gradients": [9.0], TOTAL: seconds}}
    return {
        "outcomes": [
            {key: "step", "samples": samples, "details": {}},
            {key: "memory", "samples": {}, "details": {"moe": {"held": 1, PEAK: peak}}},
            {key: "head", "samples": {key: {TOTAL: [1.0]}}, "details": {"differences": {}}},
        ]
    }


def test_ratios_are_formed_of_neighbors_of_what_both_have():
    pairs = (
        (document("subject", [1.0, 2.0, 9.0], 100), document("benchmark", [1.0], 50)),
        (document("subject", [4.0], 100), document("benchmark", [1.0, 3.0], 50)),
    )
    assert figures_of(pairs[0][0])["step", "moe", TOTAL] == 2
    ratios = Comparison(("there", "here"), pairs).ratios()
    assert set(ratios) == {("step", "moe", TOTAL), ("memory", "moe", PEAK)}
    assert ratios["step", "moe", TOTAL].median == 0.5
    assert ratios["memory", "moe", PEAK].median == 0.5
    table = Comparison(("there", "here"), pairs).markdown()
    assert "| step | moe | 3.0000 s | 1.5000 s | 0.500 (0.500 … 0.500) |" in table


def test_the_inverse_of_a_spread_is_that_of_the_reciprocals():
    values = [0.5, 1.0, 2.0, 4.0, 8.0]
    inverse = Spread.of(values).inverse()
    assert inverse == Spread.of([1 / value for value in values])
    assert inverse.lower == pytest.approx(0.25)
