"""Traces of chosen steps by torch's profiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_coe.config.run_config import LogSettings


class StepProfiler:
    """Traces the steps of `log.profile_steps` into `log.dir`/profile, for chrome://tracing.

    A run that ends inside the window leaves no trace.
    """

    def __init__(self, log: LogSettings, enabled: bool) -> None:
        steps = log.profile_steps if enabled and log.profile_steps else (0, 0)
        self._first, self._last = steps
        self._folder = Path(log.dir) / "profile"
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace the step of that number, counted from 1, if it lies in the window."""
        if number == self._first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
        yield
        if self._profile is not None and number == self._last:
            self._profile.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"steps_{self._first}_{self._last}.json"
            self._profile.export_chrome_trace(str(path))
            self._profile = None
