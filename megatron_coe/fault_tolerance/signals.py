"""Stopping a run on a signal, on all ranks at the same step.

SIGTERM (preemption), SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning before a time limit) are noted
when they arrive, and acted on before the next step, between two parts of the start-up or during a
validation: a step or a save that has begun is completed. Batch systems send several signals, to one
process or to many; any number of them counts as one. Only a second Ctrl-C interrupts at once.
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
"""A SIGINT that follows the first within this time is the same Ctrl-C: torchrun forwards to its
workers what the terminal has sent them already."""


class StopRequest:
    """The first signal that this process has received, if any."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupted_s: float | None = None

    @contextmanager
    def listening(self, process_ends: bool = False) -> Iterator[None]:
        """Note signals inside, including those that a launcher has blocked until now.

        Main thread only.

        Args:
            process_ends: the process ends after the context. Signals are then ignored, so that a
                late one cannot change the exit status; otherwise the earlier handlers come back.
        """
        previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        unblock()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_IGN if process_ends else handler)

    def received_on_any_rank(self, device: torch.device) -> signal.Signals | None:
        """Return a signal that some rank has received, the same on every rank.

        A collective of all ranks, over one integer.
        """
        import torch  # takes seconds, and signals must be noted before

        number = torch.tensor(self.received or 0, dtype=torch.int32, device=device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return signal.Signals(int(number.item())) if number else None

    def raise_if_stopped(self, device: torch.device, before: str, saves: bool) -> None:
        """Raise StoppedError on every rank, if some rank has received a signal. A collective.

        Args:
            before: what comes next, in the past tense.
            saves: whether the run saves checkpoints, so that the same command resumes it.

        Raises: StoppedError.
        """
        if reason := self.received_on_any_rank(device):
            raise StoppedError(reason, before, saves)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._log()
        if number == signal.SIGINT:
            now_s = time.monotonic()
            if self._interrupted_s is None:
                self._interrupted_s = now_s
            elif now_s - self._interrupted_s > ECHO_S:
                raise KeyboardInterrupt

    def _log(self) -> None:
        if is_local_rank_0() and self.received:
            text = f"{self.received.name}: stopping before the next step (Ctrl-C again: at once)\n"
            os.write(2, text.encode())  # not print, which this may have interrupted


def unblock() -> None:
    """Unblock the signals that `slurm/launch.py` has blocked until a process listens."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
