from __future__ import annotations

import random
import statistics
import time

import numpy as np
import pytest
import torch

from benchmarks import timing
from benchmarks.timing import TOTAL, Spread, Variant, interleave, rate, ratio

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 5, 8, 31])
def test_spread_is_median_and_quartiles(count):
    values = [random.Random(count).uniform(1, 9) for _ in range(count)]
    spread = Spread.of(values)
    assert spread.median == pytest.approx(statistics.median(values))
    quartiles = np.quantile(values, [0.25, 0.75])
    assert (spread.lower, spread.upper) == pytest.approx(tuple(quartiles))
    assert (spread.smallest, spread.largest) == (min(values), max(values))


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="--rounds"):
        Spread.of([])


def test_variants_take_turns_and_warm_up(monkeypatch):
    """Every round runs each variant once and begins with the next; only counted rounds remain."""
    now, calls = [0.0], []
    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: now[0])

    def variant(name: str, seconds: float) -> Variant:
        def run(lap):
            calls.append(name)
            now[0] += seconds
            lap("first")
            now[0] += 2 * seconds
            lap("second")
            now[0] += 3 * seconds
            lap("first")  # a part may come twice

        def prepare():
            now[0] += 100.0  # never counted

        return Variant(name, run, prepare, flops=int(12e9))

    variants = [variant("a", 1.0), variant("b", 2.0), variant("c", 4.0)]
    samples = interleave(variants, rounds=4, warmup=2, device=CPU)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 6
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert {names[0] for names in rounds} == {"a", "b", "c"}
    assert samples["a"] == {"first": [4.0] * 4, "second": [2.0] * 4, TOTAL: [6.0] * 4}
    assert ratio(samples, "b", "a").median == 2.0
    assert ratio(samples, "c", "b", "second").upper == 2.0
    assert rate(samples, variants[2]).median == pytest.approx(0.5)


def test_a_ratio_is_formed_within_each_round():
    """A machine that is ten times slower in one round changes no ratio."""
    samples = {"a": {TOTAL: [2.0, 20.0, 2.2]}, "b": {TOTAL: [1.0, 10.0, 1.1]}}
    spread = ratio(samples, "a", "b")
    assert (spread.smallest, spread.largest) == (pytest.approx(2.0), pytest.approx(2.0))


def test_processor_time_leaves_waiting_out():
    watch = timing.Stopwatch(CPU, "processor")
    watch.start()
    torch.ones(2).sum()
    time.sleep(0.2)
    watch.lap("waited")
    assert watch.stop()["waited"] < 0.1
