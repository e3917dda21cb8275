"""Detection of spikes of the training loss."""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 100
"""Latest steps that a loss is compared with."""
MIN_STEPS = 20
"""Steps before the first comparison."""
THRESHOLD = 10.0
"""Standard deviations above the median that make a spike."""
MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution, in median absolute deviations."""
MIN_RELATIVE_SIGMA = 0.01
"""Lower bound of the standard deviation, as a share of the median."""


class LossSpikeDetector:
    """Compares each loss with the median of the latest ones.

    Median and median absolute deviation are robust: a spike does not hide the next. The state is
    not saved; a resumed run starts with an empty window.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def score(self, loss: float) -> float | None:
        """Add a finite loss, and return by how many standard deviations it is a spike.

        Returns: the distance from the median of the losses before it; None if it is no spike.
        """
        score = None
        if len(self._losses) >= MIN_STEPS:
            center = median(self._losses)
            sigma = MAD_TO_SIGMA * median(abs(other - center) for other in self._losses)
            sigma = max(sigma, MIN_RELATIVE_SIGMA * abs(center), 1e-9)
            if (distance := (loss - center) / sigma) > THRESHOLD:
                score = distance
        self._losses.append(loss)
        return score
