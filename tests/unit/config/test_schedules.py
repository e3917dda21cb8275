"""Batch sizes against Megatron's own calculator, and the parts of a learning rate schedule."""

from __future__ import annotations

import math
import random

import pytest
from megatron.core import num_microbatches_calculator as megatrons

from megatron_coe.config.run_config import TrainSettings
from megatron_coe.config.schedules import BatchSchedule, LRSpans, batch_schedule, lr_spans


def calculator_of(batches: BatchSchedule) -> megatrons.NumMicroBatchesCalculator:
    """0.16's ramp, or 0.19's steps, which it has instead, at the places where it grows."""
    start, increment, samples = batches.start, batches.increment, batches.ramp_samples
    if hasattr(megatrons, "RampupBatchsizeNumMicroBatchesCalculator"):
        return megatrons.RampupBatchsizeNumMicroBatchesCalculator(
            batches.final, 1, 1, False, 0, start, increment, samples
        )
    levels = (batches.final - start) // increment
    # A later increment at the same place takes that of an earlier one.
    places = {math.ceil(samples * k / levels): start + k * increment for k in range(levels + 1)}
    schedule = " ".join(f"{place}:{size}" for place, size in places.items())
    return megatrons.StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, schedule)


def by_megatron(batches: BatchSchedule, steps: int) -> list[int]:
    """The size of each step, as its training loop would ask for it."""
    calculator = calculator_of(batches)
    sizes: list[int] = []
    for _ in range(steps):
        calculator.update(sum(sizes), consistency_check=True)
        sizes.append(calculator.get_current_global_batch_size())
    return sizes


def test_a_ramp_is_megatrons():
    """The ramps in which a batch grows step by step, by leaps, and only after many steps."""
    draw = random.Random(5)
    ramps = [BatchSchedule(2, 2, 5, 16), BatchSchedule(1, 1, 1000, 3), BatchSchedule(4, 8, 96, 36)]
    for _ in range(200):
        start, increment, levels = (draw.randint(1, 9) for _ in range(3))
        # Both are alike where Megatron's quotient, in floating point, is exact.
        ramp_samples = levels * draw.randint(1, 300)
        ramps.append(BatchSchedule(start, increment, ramp_samples, start + levels * increment))
    for batches in ramps:
        sizes = by_megatron(batches, 60)
        samples = 0
        for step, size in enumerate(sizes):
            assert batches.size(samples) == size, (batches, step)
            assert batches.samples_after(step) == samples
            assert batches.samples_after(60 - step, samples) == sum(sizes)
            samples += size
        assert sizes[-1] % batches.unit == 0 and all(size % batches.unit == 0 for size in sizes)


def test_a_constant_batch():
    batches = batch_schedule(TrainSettings(global_batch_size=6))
    assert [batches.size(samples) for samples in (0, 6, 10**9)] == [6, 6, 6]
    assert batches.samples_after(10**9) == 6 * 10**9 and batches.unit == 6
    assert str(batches) == "6"


def test_a_long_ramp_takes_no_time():
    batches = BatchSchedule(1, 1, 10**12, 10**3)
    assert batches.samples_after(10**12) > 10**14


RAMP = {"rampup_batch_size": [2, 2, 8], "global_batch_size": 4}  # 2, 2, 2, 2, 4, 4, ...
SAMPLES = 4 * 2 + 36 * 4


@pytest.mark.parametrize(
    ("train", "spans"),
    [
        ({}, LRSpans(False, 40, 4, None)),
        ({"lr_warmup_steps": 7}, LRSpans(False, 40, 7, None)),
        ({"lr_warmup_samples": 7, "global_batch_size": 3}, LRSpans(True, 120, 7, None)),
        (RAMP, LRSpans(True, SAMPLES, 15, None)),
        ({**RAMP, "lr_warmup_steps": 5}, LRSpans(True, SAMPLES, 12, None)),
        ({"lr_wsd_decay_steps": 10}, LRSpans(False, 40, 4, 10)),
        ({"lr_wsd_decay_samples": 9, "global_batch_size": 3}, LRSpans(True, 120, 12, 9)),
        ({**RAMP, "lr_wsd_decay_steps": 10}, LRSpans(True, SAMPLES, 15, 40)),
        ({**RAMP, "lr_wsd_decay_steps": 38}, LRSpans(True, SAMPLES, 15, SAMPLES - 4)),
    ],
)
def test_the_parts_of_a_schedule(train, spans):
    assert lr_spans(TrainSettings(steps=40, **train)) == spans
    assert spans.position(step=3, samples=5) == (5 if spans.in_samples else 3)
