"""The search for a variant's learning rate: a grid that grows until its best lies inside."""

from __future__ import annotations

from collections.abc import Mapping

FACTOR = 2
"""Of one learning rate of a grid to the next."""


def first_grid(rate: float) -> list[float]:
    """Return the learning rates to try first, around that of the scale."""
    return [rounded(rate / FACTOR), rate, rounded(rate * FACTOR)]


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the learning rate with the lowest loss."""
    return min(losses, key=lambda rate: losses[rate])


def next_rate(losses: Mapping[float, float]) -> float | None:
    """Return the learning rate to try next, one step beyond the end of the grid that is the best.

    Args:
        losses: mean loss of each learning rate tried.

    Returns: None where the best lies strictly inside the grid.
    """
    best = best_rate(losses)
    if best == min(losses):
        return rounded(best / FACTOR)
    if best == max(losses):
        return rounded(best * FACTOR)
    return None


def rounded(rate: float) -> float:
    """Return a rate as its name spells it, with six digits."""
    return float(f"{rate:g}")
