"""How much of a step a rank spends waiting for others, beyond what is hidden under computing.

On a CPU a rank's main thread computes or waits: what it spends in calls of process groups and their
handles is exposed. On a GPU kernels of NCCL run beside others: what no other kernel covers is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import FrameType

import torch
from torch.profiler import ProfilerActivity, profile

_GROUPS = "torch._C._distributed_c10d."
Interval = tuple[float, float]


def exposed_share(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of exposed communication over all seconds of `work`, on this rank."""
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
    """Adds up the time within functions of torch's process groups; for `sys.setprofile`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._known: dict[int, bool] = {}
        self._began = 0.0

    def __call__(self, frame: FrameType, event: str, function: object) -> None:
        if not event.startswith("c_"):
            return
        if not self._known.setdefault(id(function), _GROUPS in (function.__doc__ or "")):
            return
        if event == "c_call":
            self._began = time.perf_counter()
        else:  # c_return, c_exception
            self.seconds += time.perf_counter() - self._began


def _on_gpu(work: Callable[[], None]) -> float:
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
    """How much of the union of `intervals` lies outside the union of `cover`."""
    both = union(intervals + cover)
    return _length(both) - _length(union(cover))


def union(intervals: list[Interval]) -> list[Interval]:
    """Disjoint intervals, in order, that cover the same points."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _length(intervals: list[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
