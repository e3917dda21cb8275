"""How evenly a router loads its experts. Needs numpy alone, for the analysis of exported models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.integer] | NDArray[np.floating]


def entropy(weights: Counts) -> float:
    """Return H = -Σ p log p of the distribution that weights of any shape are proportional to."""
    shares = weights[weights > 0] / weights.sum()
    return float(-(shares * np.log(shares)).sum())


@dataclass(frozen=True)
class LoadStats:
    """How evenly a router loads its experts; p_i is expert i's share of all choices.

    Attributes:
        entropy: H(p) / log N; 1: all alike.
        max_over_mean: N · max_i p_i, the load of the busiest expert over the mean.
        dead: experts that no token was sent to.
    """

    entropy: float
    max_over_mean: float
    dead: int


def load_stats(counts_N: Counts) -> LoadStats:
    """Return the statistics of the N experts' token counts [N]."""
    N = len(counts_N)
    return LoadStats(
        entropy=entropy(counts_N) / np.log(N) if N > 1 else 1.0,
        max_over_mean=float(counts_N.max() / counts_N.mean()),
        dead=int((counts_N == 0).sum()),
    )
