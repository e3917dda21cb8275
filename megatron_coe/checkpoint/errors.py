"""Errors of checkpoints (light to import: command lines turn them into exit statuses)."""

from __future__ import annotations


class CheckpointWriteError(OSError):
    """A checkpoint that could not be written, raised by all ranks together.

    Earlier checkpoints are intact, and nothing partial is left.
    """


class BadCheckpointError(ValueError):
    """A checkpoint that must not be used; the message names the file and what is wrong with it."""

    verdict = "bad"
    """For messages."""


class NewerCheckpointError(BadCheckpointError):
    """A checkpoint that newer software wrote and this one cannot read."""

    verdict = "too new"
