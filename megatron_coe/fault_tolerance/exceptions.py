"""Ends of a run before its last step that all ranks come to together (light to import)."""

from __future__ import annotations

import signal

from megatron_coe.fault_tolerance.exit_codes import NOT_FINITE, PREEMPTED


class RunEndedError(Exception):
    """A run has ended in order, before its last step. The message says why.

    Args:
        status: with which the process is to exit.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NotFiniteError(RunEndedError):
    """Loss or gradients are not finite, and are not to be skipped. The message is the report."""

    def __init__(self, report: str, weights_are_finite: bool) -> None:
        super().__init__(report, NOT_FINITE)
        self.weights_are_finite = weights_are_finite


class DeviceMemoryError(Exception):
    """A device has no memory left, on one rank. The message is all there is to say."""


class StoppedError(RunEndedError):
    """A signal came before there was a trainer; nothing has changed."""

    def __init__(self, reason: signal.Signals, before: str, saves: bool) -> None:
        super().__init__(f"stopped by {reason.name} before {before}", stopped(reason, saves))


def stopped(reason: signal.Signals, saves: bool) -> int:
    """Exit status of a run that a signal has ended: can the same command go on from here?"""
    return PREEMPTED if saves else 128 + reason
