"""Which rank the others wait for: the one that spends the most of a step outside of collectives.

All ranks take equally long for a step, since those that are done early wait in a collective for the
slowest. Without its time in collectives, a step is as long as the rank's own work: computing,
reading data, and whatever the machine does besides.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from megatron_coe.utils.metrics_file import Record

NOTABLE = 1.2
"""How many times the median's work makes a rank a straggler."""
_LAUNCH = re.compile(r"_?(all|broadcast|gather|reduce|scatter)\w*|send|recv\w*|_end_coalescing")


class CollectiveTimer:
    """Measures what a rank spends in collectives, its waits for other ranks included.

    On a CPU it is the time of the host's waits. On a GPU it is that of the stream, between events
    that are read when the step is done, so that the host waits for nothing more.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Measure the collectives inside, whoever calls them, from 0."""
        self._spans.clear()
        # Collectives of NCCL that the host waits for run on the stream that computes.
        launches = [name for name in vars(dist.ProcessGroup) if _LAUNCH.fullmatch(name)]
        timed = [(dist.Work, "wait"), *((dist.ProcessGroup, name) for name in launches)]
        originals = [(owner, name, vars(owner)[name]) for owner, name in timed]
        for owner, name in timed:
            setattr(owner, name, self._timed(getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def seconds(self) -> float:
        """Return the time in collectives; on a GPU after the device has been synchronized."""
        if self._on_gpu:
            return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000
        return sum(end - begin for begin, end in self._spans)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._on_gpu and torch.cuda.is_current_stream_capturing():
                return call(*args, **kwargs)
            begin = self._now()
            try:
                return call(*args, **kwargs)
            finally:
                self._spans.append((begin, self._now()))

        return timed

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StragglerReport:
    """Says which rank holds up the others, once it has done so in two records in a row.

    Args:
        hosts: of each rank.
    """

    def __init__(self, hosts: list[str]) -> None:
        self._hosts = hosts
        self._slowest: int | None = None
        self._said: int | None = None

    def notice(self, step: int, record: Record) -> str | None:
        """Return what a record gives reason to say; None if it is nothing, or nothing new."""
        ratio = work_ratio(record)
        before, self._slowest = self._slowest, None
        if ratio < NOTABLE:
            self._said = None
            return None
        self._slowest = rank = int(record["slowest_rank"])
        if rank != before or rank == self._said:
            return None
        self._said = rank
        return (
            f"warning: step {step}: rank {rank} ({self._hosts[rank]}) is the slowest: it worked "
            f"for {record['work_seconds']:.3g} s, {ratio:.2f} times the median of the ranks; the "
            "others wait for it"
        )


def work_ratio(record: Record) -> float:
    """Return how many times the median rank's work the slowest does; 1 where it is unknown."""
    median = record.get("work_seconds_median")
    return record["work_seconds"] / median if median else 1.0
