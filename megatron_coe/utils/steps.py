"""Intervals of steps, as settings name them."""

from __future__ import annotations


def is_multiple(step: int, interval: int) -> bool:
    """Return whether an interval ends at a step; one of 0 never does."""
    return interval > 0 and step % interval == 0
