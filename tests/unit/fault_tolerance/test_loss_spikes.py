"""Spikes of the loss."""

from __future__ import annotations

import random

import pytest

from megatron_coe.fault_tolerance.loss_spikes import MIN_STEPS, LossSpikeDetector


def noisy(count: int, seed: int = 1) -> list[float]:
    source = random.Random(seed)
    return [3.0 - 0.002 * step + source.gauss(0, 0.1) for step in range(count)]


def test_a_loss_that_falls_with_noise_gives_no_warning():
    detector = LossSpikeDetector()
    assert [detector.score(loss) for loss in noisy(1000)] == [None] * 1000


def test_a_spike_is_scored_and_does_not_hide_the_next():
    detector = LossSpikeDetector()
    for loss in noisy(100):
        detector.score(loss)
    first, second = detector.score(6.0), detector.score(6.0)
    assert first == pytest.approx((6.0 - 2.9) / 0.1, rel=0.4)
    assert second == pytest.approx(first, rel=0.1)
    assert detector.score(0.5) is None, "a loss that falls is no spike"


def test_few_losses_and_constant_ones_are_no_spikes():
    detector = LossSpikeDetector()
    assert [detector.score(loss) for loss in [1.0, 100.0] * (MIN_STEPS // 2)] == [None] * MIN_STEPS
    constant = LossSpikeDetector()
    for _ in range(50):
        constant.score(2.0)
    assert constant.score(2.001) is None
    assert constant.score(3.0) is not None
