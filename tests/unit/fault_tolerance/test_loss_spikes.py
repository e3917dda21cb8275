"""The warning about a loss that leaps."""

from __future__ import annotations

import random

import pytest

from megatron_coe.fault_tolerance.loss_spikes import FEWEST, LossSpikeDetector


def noisy(count: int, seed: int = 1) -> list[float]:
    source = random.Random(seed)
    return [3.0 - 0.002 * step + source.gauss(0, 0.1) for step in range(count)]


def test_a_loss_that_falls_with_noise_gives_no_warning():
    watch = LossSpikeDetector()
    assert [watch.score(loss) for loss in noisy(1000)] == [None] * 1000


def test_a_leap_is_scored_and_does_not_hide_the_next():
    watch = LossSpikeDetector()
    for loss in noisy(100):
        watch.score(loss)
    first, second = watch.score(6.0), watch.score(6.0)
    assert first == pytest.approx((6.0 - 2.9) / 0.1, rel=0.4)
    assert second == pytest.approx(first, rel=0.1)
    assert watch.score(0.5) is None, "a loss that falls is no spike"


def test_few_losses_and_constant_ones_are_borne():
    watch = LossSpikeDetector()
    assert [watch.score(loss) for loss in [1.0, 100.0] * (FEWEST // 2)] == [None] * FEWEST
    constant = LossSpikeDetector()
    for _ in range(50):
        constant.score(2.0)
    assert constant.score(2.001) is None
    assert constant.score(3.0) is not None
