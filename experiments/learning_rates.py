"""The search for a variant's learning rate: a grid that grows until its best lies inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Grids = dict[str, list[float]]
"""Learning rates to try, by variant."""
Losses = Mapping[str, Mapping[float, float]]
"""Mean loss of the tuning seeds, by variant and learning rate."""

FACTOR = 2
"""Of one learning rate of a grid to the next."""


def search(scale_rates: Mapping[str, float], evaluate: Callable[[Grids], Losses]) -> Losses:
    """Search each variant's learning rate: extend its grid until the best lies strictly inside.

    Args:
        scale_rates: of each variant, around which its grid begins.
        evaluate: trains at the learning rates that it is given.

    Returns: the losses of each variant's grid.
    """
    losses: dict[str, dict[float, float]] = {name: {} for name in scale_rates}
    grids = {name: first_grid(rate) for name, rate in scale_rates.items()}
    while grids:
        for name, found in evaluate(grids).items():
            losses[name].update(found)
        further = {name: next_rate(losses[name]) for name in grids}
        grids = {name: [rate] for name, rate in further.items() if rate is not None}
    return losses


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
