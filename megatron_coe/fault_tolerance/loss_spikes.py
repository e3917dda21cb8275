"""A warning when the training loss leaps out of what it has been lately."""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 100
"""Steps that the present one is compared with."""
FEWEST = 20
"""Below so many there is nothing to compare with."""
THRESHOLD = 10.0
"""Standard deviations above the median that count as a spike."""
MAD_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation, in median absolute deviations."""
LEAST_SPREAD = 0.01
"""Share of the median below which the spread of the losses is not believed."""


class LossSpikeDetector:
    """Keeps the latest losses; statistics are robust, so that a spike does not hide the next.

    It begins anew when a run is resumed.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def score(self, loss: float) -> float | None:
        """How far a finite loss lies above the median of those before it, in standard deviations;
        None when it is no spike. It joins the others."""
        score = None
        if len(self._losses) >= FEWEST:
            center = median(self._losses)
            spread = MAD_TO_SIGMA * median(abs(other - center) for other in self._losses)
            spread = max(spread, LEAST_SPREAD * abs(center), 1e-9)
            if (distance := (loss - center) / spread) > THRESHOLD:
                score = distance
        self._losses.append(loss)
        return score
