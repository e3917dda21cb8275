"""What goes wrong with checkpoints (light to import: command lines turn it into exit statuses)."""

from __future__ import annotations


class CheckpointWriteError(OSError):
    """A checkpoint cannot be written. Those before it are as they were, nothing partial is left.

    Raised by all ranks together.
    """


class BadCheckpointError(ValueError):
    """A checkpoint that must not be used; the message names its file and what is wrong with it."""

    verdict = "bad"


class NewerCheckpointError(BadCheckpointError):
    """A checkpoint that newer software wrote, in a way that this one cannot read."""

    verdict = "too new"
