"""Exceptions that end a run (light to import)."""

from __future__ import annotations

import signal

from megatron_coe.fault_tolerance.exit_codes import NOT_FINITE, PREEMPTED


class RunEndedError(Exception):
    """An orderly end before the last step, for the reason in the message; raised by all ranks.

    Args:
        status: the exit status of the process.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NotFiniteError(RunEndedError):
    """Loss or gradients that are not finite and must not be skipped; the message is the report."""

    def __init__(self, report: str, weights_are_finite: bool) -> None:
        super().__init__(report, NOT_FINITE)
        self.weights_are_finite = weights_are_finite


class StoppedError(RunEndedError):
    """A signal that came before the first step; nothing has changed."""

    def __init__(self, reason: signal.Signals, before: str, saves: bool) -> None:
        super().__init__(f"stopped by {reason.name} before {before}", status_of(reason, saves))


class RankError(Exception):
    """An error of one rank; the message is complete without a traceback."""


class DeviceMemoryError(RankError):
    """A device is out of memory."""


class DataWorkerError(RankError):
    """A process that prepares batches has ended by itself."""


def status_of(reason: signal.Signals, saves: bool) -> int:
    """Return the exit status of a run that a signal has ended.

    Args:
        saves: whether the run saves checkpoints, so that the same command resumes it.
    """
    return PREEMPTED if saves else 128 + reason
