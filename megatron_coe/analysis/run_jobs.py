"""Training runs, several at a time, in processes that share the import of Megatron.

A server imports it once and forks a process for each run, which saves the seconds that the import
takes, and keeps threads and a GPU's context, which a fork would inherit, out of this process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from megatron_coe.config.run_config import Settings
from megatron_coe.fault_tolerance.exit_codes import DONE
from megatron_coe.megatron_compat import transformer_engine
from megatron_coe.training.pretrain import Request, pretrain
from megatron_coe.utils.files import atomic_path, check_writable
from megatron_coe.utils.metrics_file import read_records
from megatron_coe.utils.run_files import CONFIG_FILE, METRICS_FILE

SETTINGS_FILE = "settings.yaml"
CONSOLE_FILE = "console.log"
_LOCK_FILE = ".lock"

_IGNORED_WARNINGS = (
    "ignore:Apex is not installed",
    "ignore:Transformer Engine and Apex are not installed",
)
_PRELOADED = ("megatron_coe.training.build", "torch.utils.tensorboard")


@dataclass(frozen=True)
class Run:
    """A run to train, in the folder of its settings' `log.dir`."""

    name: str
    settings: Settings

    @property
    def folder(self) -> Path:
        return Path(self.settings.log.dir)

    @property
    def metrics(self) -> Path:
        return self.folder / METRICS_FILE

    @property
    def _written(self) -> Path:
        return self.folder / SETTINGS_FILE

    def check(self) -> None:
        """Check that the folder is writable and holds no run with other settings.

        Raises:
            ValueError: it holds one.
            OSError: the folder cannot be written.
        """
        check_writable(self._written)
        if not self._written.exists():
            return
        before = self._written.read_text(encoding="utf-8", errors="replace")
        now = self.settings.to_yaml()
        if before != now:
            raise ValueError(
                f"{self._written}: the run there has other settings ({_difference(before, now)}); "
                "name another --output"
            )

    def prepare(self) -> None:
        """Write its settings into its folder, after `check`."""
        self.check()
        if not self._written.exists():
            with atomic_path(self._written) as temporary:
                temporary.write_text(self.settings.to_yaml(), encoding="utf-8")

    def is_done(self) -> bool:
        """Return whether its last step was trained and validated."""
        if not (self.metrics.exists() and (self.folder / CONFIG_FILE).exists()):
            return False
        try:
            records = read_records(self.metrics)
        except ValueError:  # a line cut short by a crash, which the run removes when it resumes
            return False
        steps = self.settings.train.steps
        return any(record["step"] == steps and "valid_loss" in record for record in records)


def last_validation_loss(folder: Path) -> float:
    """Return the last validation loss of a run, nats per token.

    Raises:
        ValueError: there is none.
        OSError: there is no such run.
    """
    metrics = folder / METRICS_FILE
    found = [record["valid_loss"] for record in read_records(metrics) if "valid_loss" in record]
    if not found:
        raise ValueError(f"{metrics}: holds no validation loss; set data.valid")
    return found[-1]


def server() -> ForkServerContext:
    """Return a context that forks processes with Megatron imported.

    Raises:
        ValueError: it cannot be imported beside a broken Transformer Engine.
    """
    transformer_engine.is_installed()  # asked here: in the server it would be a traceback
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in pretrain_coe.py; read on import
    # Megatron's modules each warn on import that they do without Apex.
    os.environ.setdefault("PYTHONWARNINGS", ",".join(_IGNORED_WARNINGS))
    # Megatron's modules ask on import whether there is a GPU: by NVML, which a fork survives.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def train(
    runs: Sequence[Run],
    jobs: int,
    threads: int,
    on_done: Callable[[Run], object] = lambda run: None,
) -> None:
    """Train the runs that are not done, in their order; an interrupted one is resumed.

    Args:
        runs: to train.
        jobs: runs at a time.
        threads: CPU threads of each run.
        on_done: called with each run that is done, as soon as it is.

    Raises:
        ValueError: a run failed; the message names it and its log. The others in progress save and
            end first.
        KeyboardInterrupt: as received, after the runs in progress have saved.
    """
    for run in runs:
        run.prepare()
    waiting = []
    for run in runs:
        if run.is_done():
            on_done(run)
        else:
            waiting.append(run)
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already", flush=True)
    context, left = server(), len(waiting)
    running: dict[ForkServerProcess, tuple[Run, float]] = {}
    with _ended_on_exit(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                process = context.Process(target=_train, args=(str(run.folder), threads))
                process.start()
                running[process] = run, time.monotonic()
            connection.wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                run, began_s = running.pop(process)
                _check_end(run, process.exitcode)
                on_done(run)
                left -= 1
                print(
                    f"{run.name}: validation loss {last_validation_loss(run.folder):.4f} after "
                    f"{time.monotonic() - began_s:.0f} s; {left} to go",
                    flush=True,
                )


@contextlib.contextmanager
def _ended_on_exit(running: dict[ForkServerProcess, tuple[Run, float]]) -> Iterator[None]:
    """Tell the runs in progress to save and end, however the block ends, and wait for them."""
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()


def _check_end(run: Run, status: int | None) -> None:
    if status == DONE and run.is_done():
        return
    log = run.folder / CONSOLE_FILE
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "no message")
    raise ValueError(f"{run.folder}: the run ended with status {status}: {last} (see {log})")


def _train(folder: str, threads: int) -> None:
    """Train in this process, a run's own, with its messages in a file."""
    log = os.open(Path(folder, CONSOLE_FILE), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    # One process to a folder: a run whose starter was killed may still be saving.
    lock = os.open(Path(folder, _LOCK_FILE), os.O_WRONLY | os.O_CREAT, 0o644)
    fcntl.flock(lock, fcntl.LOCK_EX)
    import torch  # which the server has

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_starter, daemon=True).start()
    sys.exit(pretrain(Request(Path(folder, SETTINGS_FILE), is_process=False)))


def _end_with_starter() -> None:
    starter = parent_process()
    assert starter is not None
    starter.join()
    os.kill(os.getpid(), signal.SIGTERM)  # saves and ends


def _difference(before: str, now: str) -> str:
    """Describe the first line that differs."""
    pairs = zip(before.splitlines(), now.splitlines(), strict=False)
    differing = (f"{old.strip()}, now {new.strip()}" for old, new in pairs if old != new)
    return next(differing, "one has more")
