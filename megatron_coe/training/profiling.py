"""A trace of chosen steps by torch's profiler."""

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
        self._window = tuple(log.profile_steps) if enabled and log.profile_steps else None
        self._folder = Path(log.dir) / "profile"
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step of that number, counted from 1."""
        if self._window and number == self._window[0]:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
        yield
        if self._profile is not None and number == self._window[1]:
            self._profile.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            first, last = self._window
            self._profile.export_chrome_trace(str(self._folder / f"steps_{first}_{last}.json"))
            self._profile = None
