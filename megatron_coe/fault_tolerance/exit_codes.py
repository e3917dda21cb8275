"""How `pretrain_coe.py` ends: statuses for batch systems, those of sysexits.h where one fits.

A signal that ends a run with nothing saved, or a second Ctrl-C, gives 128 plus its number.
"""

from __future__ import annotations

DONE = 0
"""The last step is done, and saved where a folder is named."""

CONFIG_ERROR = 2
"""A mistake of the user in settings, data or checkpoint, said in one message; also: checkpoints
are there and none is good."""

NOT_FINITE = 65
"""`EX_DATAERR`: loss or gradients were not finite. Nothing of them was applied, nothing is lost."""

RANK_FAILURE = 70
"""`EX_SOFTWARE`: a rank hangs, died or failed; the message names it."""

NOT_WRITTEN = 74
"""`EX_IOERR`: a checkpoint could not be written; those before it are as they were."""

PREEMPTED = 75
"""`EX_TEMPFAIL`, try again: a signal ended the run with everything saved; the same command goes on,
and batch scripts requeue on this status alone."""
