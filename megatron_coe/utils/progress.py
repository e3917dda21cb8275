"""How far a long job is: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Progress over `total` bytes, on stderr.

    Args:
        total: bytes of all inputs.
        quiet: say nothing but notes.
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self._total, self._done = total, 0
        live = not quiet and sys.stderr.isatty()
        self._bar = tqdm(total=total, unit="B", unit_scale=True) if live else None
        self._next_line = float("inf") if quiet else time.monotonic() + SECONDS_BETWEEN_LINES

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, done: int, state: str) -> None:
        """`done` bytes in all are finished; `state` is shown beside."""
        if self._bar is not None:
            self._bar.set_postfix_str(state, refresh=False)
            self._bar.update(done - self._done)
        elif time.monotonic() >= self._next_line:
            self.note(f"{done / max(self._total, 1):.0%}, {state}")
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        self._done = done

    @staticmethod
    def note(line: str) -> None:
        """Prints a line without breaking the bar."""
        tqdm.write(line, file=sys.stderr)
