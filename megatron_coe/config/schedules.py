"""What changes during a run: the global batch size, and the parts of the learning rate's schedule.

Both are functions of the sequences consumed so far and of nothing else, so that they are the same
in every layout and after a resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from megatron_coe.config.run_config import TrainSettings


@dataclass(frozen=True)
class BatchSchedule:
    """The global batch size of each step: constant, or ramped up as Megatron does.

    From `start` it grows by `increment` at equal distances, in sequences consumed, and is `final`
    once `ramp_samples` are. So it is in `megatron.core.num_microbatches_calculator` of 0.16, whose
    floating-point division sometimes grows it a step later; 0.19's ignores the setting.
    """

    start: int
    increment: int
    ramp_samples: int
    final: int

    @staticmethod
    def constant(size: int) -> BatchSchedule:
        """Return the schedule of steps that all have `size` sequences."""
        return BatchSchedule(size, 0, 0, size)

    @property
    def unit(self) -> int:
        """Return the greatest number that divides every size on the way."""
        return gcd(self.start, self.increment, self.final)

    def size(self, samples: int) -> int:
        """Return the sequences of the step that begins after `samples` of them."""
        if samples >= self.ramp_samples:
            return self.final
        return self.start + self._increments(samples) * self.increment

    def samples_after(self, steps: int, samples: int = 0) -> int:
        """Return the sequences consumed after `steps` steps that begin after `samples` of them."""
        while steps > 0:
            size, count = self.size(samples), steps
            if samples < self.ramp_samples:  # up to the next increment
                levels = (self.final - self.start) // self.increment
                end = -(-(self._increments(samples) + 1) * self.ramp_samples // levels)
                count = min(steps, -(-(end - samples) // size))
            samples += count * size
            steps -= count
        return samples

    def _increments(self, samples: int) -> int:
        return samples * ((self.final - self.start) // self.increment) // self.ramp_samples

    def __str__(self) -> str:
        if not self.ramp_samples:
            return f"{self.final:,}"
        return (
            f"{self.start:,} to {self.final:,}, by {self.increment:,}, over the first "
            f"{self.ramp_samples:,} sequences"
        )


def batch_schedule(train: TrainSettings) -> BatchSchedule:
    """Return the batch sizes of a run."""
    if train.rampup_batch_size is None:
        return BatchSchedule.constant(train.global_batch_size)
    start, increment, ramp_samples = train.rampup_batch_size
    return BatchSchedule(start, increment, ramp_samples, train.global_batch_size)


@dataclass(frozen=True)
class LRSpans:
    """The parts of a learning rate schedule, all in steps or all in sequences consumed.

    Both are the same curve as long as the batch size is. It counts sequences, as Megatron's own
    training loop does, where the batch size changes or a setting is given in them.
    """

    in_samples: bool
    total: int
    warmup: int
    """Length of the linear rise from 0."""
    wsd_decay: int | None
    """Length of the fall at the end, in the style WSD."""

    def position(self, step: int, samples: int) -> int:
        """Return the place of the step that follows `step` ones and `samples` sequences."""
        return samples if self.in_samples else step


def lr_spans(train: TrainSettings) -> LRSpans:
    """Return the parts of the schedule that the settings ask for."""
    batches = batch_schedule(train)
    of_samples = (train.lr_warmup_samples, train.lr_wsd_decay_samples, train.rampup_batch_size)
    in_samples = any(value is not None for value in of_samples)

    def after(steps: int) -> int:
        return batches.samples_after(steps) if in_samples else steps

    total = after(train.steps)
    warmup, decay = train.lr_warmup_samples, train.lr_wsd_decay_samples
    if warmup is None:
        steps = train.lr_warmup_steps
        warmup = int(train.lr_warmup_fraction * total) if steps is None else after(steps)
    if decay is None and train.lr_wsd_decay_steps is not None:
        decay = total - after(max(0, train.steps - train.lr_wsd_decay_steps))
    return LRSpans(in_samples, total, warmup, decay)
