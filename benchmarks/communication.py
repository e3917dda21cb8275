"""How much of a step a rank spends waiting for others, beyond what is hidden under computing.

On a CPU a rank's main thread computes or waits: what it spends in calls of process groups and their
handles is exposed. On a GPU kernels of NCCL run beside others: what no other kernel covers is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_GROUPS = "torch._C._distributed_c10d."
Interval = tuple[float, float]


def exposed_share(work: Callable[[], object], device: torch.device) -> float:
    """Return seconds of exposed communication over all seconds of `work`, on this rank."""
    if device.type == "cuda":
        return _on_gpu(work)
    watch = _Calls()
    started = time.perf_counter()
    sys.setprofile(watch)  # sees calls of C functions too, in this thread only
    try:
        work()
    finally:
        sys.setprofile(None)
    return watch.seconds / (time.perf_counter() - started)


class _Calls:
    """Adds up the time within functions of torch's process groups; for `sys.setprofile`.

    A function of C began at the event before its return: that is the call, but for Python 3.12.1,
    which reports no call of a built-in method; there it is the last thing that Python did.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._known: dict[tuple[type, str], bool] = {}
        self._latest = time.perf_counter()

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        if event in ("c_return", "c_exception") and self._is_of_groups(function):
            self.seconds += time.perf_counter() - self._latest
        self._latest = time.perf_counter()

    def _is_of_groups(self, function: Any) -> bool:
        # Not by `id(function)`: a bound method lasts as long as its call, and its number is reused.
        name = type(getattr(function, "__self__", None)), function.__name__
        if name not in self._known:
            self._known[name] = _GROUPS in (function.__doc__ or "")
        return self._known[name]


def _on_gpu(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    communication: list[Interval] = []
    computation: list[Interval] = []
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kind = communication if event.name.startswith("nccl") else computation
            kind.append((event.time_range.start, event.time_range.end))
    return uncovered(communication, computation) / 1e6 / seconds  # the profiler's are microseconds


def uncovered(intervals: list[Interval], cover: list[Interval]) -> float:
    """Return how much of the union of `intervals` lies outside the union of `cover`."""
    both = union(intervals + cover)
    return _length(both) - _length(union(cover))


def union(intervals: list[Interval]) -> list[Interval]:
    """Return disjoint intervals, in order, that cover the same points."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _length(intervals: list[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
