"""Run a `coe` command beside a training run, out of its way and no longer than it.

    python -m megatron_coe.cli.background convert to-hf --input … --output …

The command comes last in line for processor and disk, and ends when its standard input does: the
run that has started it is then gone, however it ended. What it has begun to write is removed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress

import psutil

from megatron_coe.cli import main as coe
from megatron_coe.fault_tolerance.signals import unblock


def main() -> int:
    """Run the command that the command line names; return its exit status."""
    unblock()  # what the launcher of the run has blocked
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    with suppress(psutil.Error, OSError):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    return coe.main()


def _end_with_the_run() -> None:
    while os.read(sys.stdin.fileno(), 1 << 10):
        pass
    os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C: what is half written is removed


if __name__ == "__main__":
    sys.exit(main())
