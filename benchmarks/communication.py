"""Exposed communication of a step: the time that does not overlap with computation.

On a CPU a rank's main thread computes or waits: its time in calls of process groups and their
handles is exposed. On a GPU it is the time of NCCL's kernels when no other kernel runs.
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
    """Measure the exposed communication of `work`, as a share of its time, on this rank."""
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
    """A profiler for `sys.setprofile` that sums the time in functions of torch's process groups.

    A function of C began at the event before its return. That event is its call, except in Python
    3.12.1, which reports no calls of built-in methods; there it is the last event of Python code.
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
    return exposed(communication, computation) / 1e6 / seconds  # the profiler's are microseconds


def exposed(communication: list[Interval], computation: list[Interval]) -> float:
    """Return the length of the union of the first intervals outside the union of the second."""
    both = union(communication + computation)
    return _length(both) - _length(union(computation))


def union(intervals: list[Interval]) -> list[Interval]:
    """Merge intervals into disjoint ones, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _length(intervals: list[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
