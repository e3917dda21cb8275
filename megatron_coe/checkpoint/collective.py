"""Errors of any rank, raised on all: a rank that raised alone would leave the others waiting."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from megatron_coe.checkpoint.errors import BadCheckpointError, CheckpointWriteError

T = TypeVar("T")


def write_on_all_ranks(what: str, action: Callable[[], T]) -> T:
    """Call `action`, which writes files, on every rank; return its result, or raise on all.

    A collective of all ranks; `action` must be none.

    Args:
        what: could not be written, to begin the error with.

    Raises: CheckpointWriteError with the reason of the first rank that failed.
    """
    result: T | None = None
    error: str | None = None
    try:
        result = action()
    except OSError as failure:
        error = f"{failure.strerror or failure}" + (
            f" ({failure.filename})" if failure.filename else ""
        )
    except Exception as failure:  # the others must raise it, whatever it is
        error = f"{type(failure).__name__}: {failure}"
    if error is not None:
        error = f"rank {dist.get_rank()} on {socket.gethostname()}: {error}"
    if first := _first_error(error):
        raise CheckpointWriteError(f"{what}: {first}")
    return cast("T", result)


def check_on_all_ranks(check: Callable[[], T]) -> T:
    """Call `check`, each rank's share of it, on every rank; return its result, or raise on all.

    A collective of all ranks; `check` must be none.

    Raises: BadCheckpointError of the first rank that failed, of the class that it raised.
    """
    result: T | None = None
    error: BadCheckpointError | None = None
    try:
        result = check()
    except BadCheckpointError as failure:
        error = failure
    except (ValueError, OSError) as failure:
        error = BadCheckpointError(str(failure))
    if first := _first_error(error):
        raise first
    return cast("T", result)


def _first_error(error: T | None) -> T | None:
    """Return the error of the first rank that has one, on every rank."""
    errors: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((e for e in errors if e), None)
