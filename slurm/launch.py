"""torchrun for a batch system: signals reach the workers, and their exit status comes back.

    python slurm/launch.py --nnodes 2 --nproc-per-node 8 … pretrain_coe.py --config …

takes what torchrun takes. torchrun by itself ends with status 1 whatever its workers ended with,
dies of SIGUSR1, and 30 seconds after SIGTERM it kills: a job could not tell a run that was saved,
to be continued (75), from a failure, and a save that takes longer would be lost. This one passes
signals on and goes on waiting; for how long is the batch system's affair.

Exit status: 0, or that of the worker that failed first (128 + number for one that a signal ended).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from megatron_coe.fault_tolerance.signals import STOP_SIGNALS

LOG_DIR = "PET_LOG_DIR"  # torchrun's --log-dir


def main(arguments: list[str]) -> int:
    # Blocked here and in the workers, which inherit it, until they listen: none is ever lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=pass_signals_on, daemon=True).start()
    from torch.distributed import run  # takes seconds
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if LOG_DIR in os.environ and "SLURM_NODEID" in os.environ:
        os.environ[LOG_DIR] += f"/node_{os.environ['SLURM_NODEID']}"
    try:
        run.main(["--signals-to-handle=SIGQUIT", *arguments])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


def pass_signals_on() -> None:
    import psutil

    while True:
        number = signal.sigwait(STOP_SIGNALS)
        for worker in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
