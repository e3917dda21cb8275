"""Which process acts and prints for all the others. torch is imported only by a call."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar, cast

T = TypeVar("T")


def is_local_rank_0() -> bool:
    """Return whether this process prints for its machine: the launcher's local rank 0."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def cores_of_rank() -> int:
    """Return how many of the machine's cores a rank has, if all there have as many."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def is_rank_0() -> bool:
    """Return whether this process acts for all: rank 0, or a process without others."""
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def log_rank_0(text: str) -> None:
    """Print a line on stderr, on rank 0 only."""
    if is_rank_0():
        print(text, file=sys.stderr, flush=True)


def call_on_rank_0(function: Callable[[], T]) -> T:
    """Call a function on rank 0, and return its result or raise its error on every rank.

    A collective of all ranks; the function must be none. Without a process group it is just called.

    Args:
        function: its result and its errors can be pickled.

    Raises: ValueError or OSError, whichever the function raised.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return function()
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(function(), None)]
        except (ValueError, OSError) as failure:
            outcome = [(None, failure)]
    dist.broadcast_object_list(outcome)
    ((result, error),) = outcome
    if error is not None:
        raise error
    return cast("T", result)
