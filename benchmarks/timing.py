"""Timing of variants that take turns in one process, and ratios of their times.

The speed of a shared machine changes from minute to minute. Variants that take turns see the same
minutes, so ratios are formed within each round and reported as a median with quartiles; seconds are
shown beside them for orientation only.

Where other processes run on the same core, wall time includes theirs. For one thread the processor
time of this process does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Lap = Callable[[str], None]
"""A function that ends a part of a variant's run, under that name."""

Samples = dict[str, dict[str, list[float]]]
"""Seconds of each part of each variant, a value per round: `samples[variant][part]`."""

CLOCKS: dict[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "processor": time.process_time,
}
"""Clocks on a CPU; on a GPU, CUDA events measure the stream's time."""

TOTAL = "total"
"""The name of the sum of a variant's parts."""


@dataclass(frozen=True)
class Variant:
    """Timed work to compare with other variants.

    Args:
        name: in tables.
        run: the work; calls its argument at the end of each part.
        prepare: untimed preparation of each run.
        flops: floating-point operations of a run; 0 if no rate is needed.
        tokens: of a run.
    """

    name: str
    run: Callable[[Lap], None]
    prepare: Callable[[], None] = field(default=lambda: None)
    flops: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Spread:
    """Median, quartiles, minimum and maximum of samples."""

    median: float
    lower: float
    upper: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute the spread of samples.

        Raises:
            ValueError: there are none.
        """
        if not values:
            raise ValueError("no samples: give --rounds at least 1")
        if len(values) == 1:
            return cls(*[values[0]] * 5)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, min(values), max(values))

    def inverse(self) -> Spread:
        """Return the spread of the samples' reciprocals (of positive samples)."""
        return Spread(
            1 / self.median, 1 / self.upper, 1 / self.lower, 1 / self.largest, 1 / self.smallest
        )

    def text(self, digits: int = 3) -> str:
        """Return the median, with the quartiles in parentheses."""
        shown = (f"{value:,.{digits}f}" for value in (self.median, self.lower, self.upper))
        return "{} ({} … {})".format(*shown)


class Stopwatch:
    """A stopwatch of the seconds between laps: of a clock on a CPU, of the stream on a GPU."""

    def __init__(self, device: torch.device, clock: str = "wall") -> None:
        self._on_gpu = device.type == "cuda"
        self._now = CLOCKS[clock]
        self._marks: list[tuple[str, Any]] = []  # a time, or on a GPU an event

    def start(self) -> None:
        """Start the first part, after all earlier work has finished."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._marks = []
        self.lap("")

    def lap(self, name: str) -> None:
        """End the part `name`. On a GPU its end is marked in the stream, without waiting for it."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, self._now()))

    def stop(self) -> dict[str, float]:
        """Return the seconds of each part since `start`, and their sum."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] = seconds.get(name, 0.0) + self._between(begin, end)
        return {**seconds, TOTAL: sum(seconds.values())}

    def _between(self, begin: Any, end: Any) -> float:
        if self._on_gpu:
            return begin.elapsed_time(end) / 1e3  # it counts milliseconds
        return end - begin


def interleave(
    variants: Sequence[Variant],
    rounds: int,
    warmup: int,
    device: torch.device,
    clock: str = "wall",
) -> Samples:
    """Run each variant once per round, after `warmup` rounds that are not counted.

    Each round begins with another variant, so that none is always first.
    """
    samples: Samples = {variant.name: {} for variant in variants}
    watch = Stopwatch(device, clock)
    for index in range(-warmup, rounds):
        first = index % len(variants)
        for variant in [*variants[first:], *variants[:first]]:
            variant.prepare()
            watch.start()
            variant.run(watch.lap)
            seconds = watch.stop()
            for part, value in seconds.items() if index >= 0 else ():
                samples[variant.name].setdefault(part, []).append(value)
    return samples


def ratio(samples: Samples, variant: str, to: str, part: str = TOTAL) -> Spread:
    """Return the time of `variant` over that of `to`, formed within each round."""
    pairs = zip(samples[variant][part], samples[to][part], strict=True)
    return Spread.of([ours / theirs for ours, theirs in pairs])


def rate(samples: Samples, variant: Variant, part: str = TOTAL) -> Spread:
    """Return the GFLOP/s of a variant."""
    return Spread.of([variant.flops / seconds / 1e9 for seconds in samples[variant.name][part]])
