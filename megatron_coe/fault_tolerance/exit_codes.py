"""Exit statuses of a training run: those of sysexits.h where one fits.

A signal that ends a run without a checkpoint, or a second Ctrl-C, gives 128 plus its number.
"""

from __future__ import annotations

DONE = 0
"""The last step is done, and saved if `checkpoint.save` names a folder."""

CONFIG_ERROR = 2
"""An error of the user in settings, data or checkpoint, reported in one message; also: there are
checkpoints, and none is valid."""

NOT_FINITE = 65
"""`EX_DATAERR`: loss or gradients were not finite. They were not applied, and nothing is lost."""

RANK_FAILURE = 70
"""`EX_SOFTWARE`: a rank hung, died or failed; the message names it."""

NOT_WRITTEN = 74
"""`EX_IOERR`: a checkpoint could not be written; earlier ones are intact. Also: all steps are done
and saved, and an export to a Hugging Face folder has failed."""

PREEMPTED = 75
"""`EX_TEMPFAIL`: a signal ended the run with everything saved. The same command resumes it, and
batch scripts requeue on this status alone."""
