"""Ending a run in order when a signal asks for it, on all ranks at the same step.

SIGTERM (preemption), SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning before a time limit) are noted
when they arrive, at whatever moment, and heeded before the next step, between two parts of a start
or in the midst of a validation: a step or a save that has begun is finished. A batch system sends
several of them, to many processes or to one: any number counts as one. Only a second Ctrl-C, of a
person who will not wait, interrupts the run where it is.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from megatron_coe.fault_tolerance.exceptions import StoppedError
from megatron_coe.utils.ranks import is_local_rank_0

if TYPE_CHECKING:
    import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

ECHO_S = 1.0
"""A SIGINT that follows the first by less is the same Ctrl-C: torchrun sends its workers once more
what the terminal has sent them already."""


class StopRequest:
    """The signal that this process has received, if any."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupted_s: float | None = None

    @contextmanager
    def listening(self, process_ends: bool = False) -> Iterator[None]:
        """Notes signals from here on, those that a launcher blocked until now included.

        Main thread only.

        Args:
            process_ends: when this is left, so does the process: signals are then ignored, lest
                one that is late change the exit status. Otherwise earlier handlers come back.
        """
        previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        unblock()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_IGN if process_ends else handler)

    def agreed(self, device: torch.device) -> signal.Signals | None:
        """A signal that some rank has received, with the same answer on every rank.

        A collective of all ranks, over one integer.
        """
        import torch  # takes seconds, and signals must be noted before

        number = torch.tensor(self.received or 0, dtype=torch.int32, device=device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return signal.Signals(number.item()) if number else None

    def raise_if_stopped(self, device: torch.device, before: str, saves: bool) -> None:
        """Raise StoppedError on every rank, if some rank has received a signal. A collective.

        Args:
            before: what comes next, in the past tense.
            saves: whether the same command could go on.
        """
        if reason := self.agreed(device):
            raise StoppedError(reason, before, saves)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._say()
        if number == signal.SIGINT:
            now_s = time.monotonic()
            if self._interrupted_s is None:
                self._interrupted_s = now_s
            elif now_s - self._interrupted_s > ECHO_S:
                raise KeyboardInterrupt

    def _say(self) -> None:
        if is_local_rank_0():
            text = f"{self.received.name}: ends before the next step (Ctrl-C once more: at once)\n"
            os.write(2, text.encode())  # not print, which this may have interrupted


def unblock() -> None:
    """Lets signals in that `slurm/launch.py` has blocked, to keep them until someone listens."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
