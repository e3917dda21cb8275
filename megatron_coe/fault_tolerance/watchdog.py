"""Ending a run in which a rank hangs, dies or fails: all ranks, in bounded time, naming the rank.

A thread of each rank publishes, through a store and at a fixed interval, a report of what the rank
is doing. It needs neither the main thread nor the device, so that it also runs while the main
thread hangs in a collective. A rank that makes no progress for too long, whose neighbor stops
reporting, or that raises an error publishes a failure. The first failure counts, and every rank
that reads it exits.

The failure names a rank that no longer reports (killed, stopped, its machine lost); else, among
those that do not wait for others, the one that has come least far.
"""

from __future__ import annotations

import faulthandler
import json
import linecache
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

import psutil
import torch.distributed as dist

from megatron_coe.fault_tolerance.exceptions import RankError
from megatron_coe.fault_tolerance.exit_codes import CONFIG_ERROR, NOT_WRITTEN, RANK_FAILURE
from megatron_coe.fault_tolerance.heartbeat import (
    DATA,
    DONE,
    LOADING,
    MODEL,
    SAVING,
    START,
    Heartbeat,
)
from megatron_coe.utils.errors import DataError
from megatron_coe.utils.ranks import is_local_rank_0

STARTUP_PHASES = (START, DATA, MODEL, LOADING)
SLOW_PHASES = (*STARTUP_PHASES, SAVING)
SLOW_PHASE_FACTOR = 6
"""How much longer than a step these phases may take without progress."""
REPORTS_PER_TIMEOUT = 20
MIN_INTERVAL_S, MAX_INTERVAL_S = 0.1, 2.0
"""Bounds of the time between two reports."""
SILENT_REPORTS, SILENT_S = 4, 2.0
"""Intervals, and seconds, after which a rank with an unchanged report counts as silent."""
_FAILURE, _REPORT = "watchdog/failure", "watchdog/rank_{}"
_COMMUNICATION = ("/torch/distributed/", "/pipeline_parallel/p2p_communication.py")
_BROKEN_LINK = ("gloo", "Connection", "connection", "NCCL", "peer", "Socket", "recv", "Timed out")


@dataclass(frozen=True)
class Report:
    """What a rank is doing."""

    rank: int
    host: str
    pid: int
    number: int
    """Of the report, counted by its rank."""
    phase: str
    step: int
    updates: int
    """Of the heartbeat."""
    doing: str
    """The heartbeat in words."""
    idle_s: float
    """Seconds since the latest sign of progress."""
    waits: bool
    """Whether the main thread communicates with other ranks, as far as its stack shows."""
    line: str
    """Function, file and line that the main thread executes."""

    @property
    def name(self) -> str:
        """The rank, for messages."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"


@dataclass(frozen=True)
class Failure:
    """Why the run ends, the same for all ranks."""

    reporter: int
    """The rank that has found it."""
    raised_by: int | None
    """The rank whose main thread raised an error; None: found by a watchdog thread."""
    status: int
    """Exit status of every rank."""
    text: str


class Watchdog:
    """The watchdog of one rank, in a thread of its own.

    Args:
        store: a connection that nothing else uses.
        timeout_s: time without progress that makes a failure.
        heartbeat: of this rank.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, timeout_s: float, heartbeat: Heartbeat
    ) -> None:
        self.timeout_s = timeout_s
        self.interval_s = min(max(timeout_s / REPORTS_PER_TIMEOUT, MIN_INTERVAL_S), MAX_INTERVAL_S)
        self._silent_intervals = max(SILENT_REPORTS, math.ceil(SILENT_S / self.interval_s))
        self._store = store
        self._rank, self._world_size = rank, world_size
        self._heartbeat = heartbeat
        self._main_thread = threading.main_thread().ident
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._report_number = 0
        self._clock_s = 0.0
        """Runs only while this process does: after a SIGSTOP it accuses no rank of that time."""
        self._updates, self._progress_s = -1, 0.0
        self._neighbor_report, self._neighbor_s = -1, 0.0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Publish a first report, and start the thread."""
        self._publish_report()
        self._thread.start()

    def close(self) -> None:
        """End the thread, and tell the others that this rank is done."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._heartbeat.enter(DONE)
        with suppress(RuntimeError):  # the others may be gone, and the store with them
            self._publish_report()

    def fail(self, error: Exception) -> Failure:
        """Publish what has ended this rank's main thread: this error, or what caused it.

        Returns: the failure that counts, which another rank may have published before.
        """
        self._ended.set()  # from here on the main thread prints
        self._thread.join()
        # The other end of a link that breaks has died, unless it has published a failure.
        is_broken_link = any(word in str(error) for word in _BROKEN_LINK)
        if is_broken_link and not self._read_failure() and (silent := self._silent_ranks()):
            return self._publish_failure(self._describe_silent(silent), RANK_FAILURE)
        own = self._own_report()
        starts = own.phase in STARTUP_PHASES and isinstance(error, (ValueError, OSError))
        if starts or isinstance(error, DataError):
            text = f"rank {self._rank} ({own.host}): {error}"
            return self._publish_failure(text, CONFIG_ERROR, raised_by=self._rank)
        if isinstance(error, RankError):
            text = f"{own.name}: {error}"
            return self._publish_failure(text, RANK_FAILURE, raised_by=self._rank)
        status = NOT_WRITTEN if isinstance(error, OSError) else RANK_FAILURE
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        text = f"{own.name} failed in {own.doing}: {what}"
        return self._publish_failure(text, status, raised_by=self._rank)

    # --- the thread -------------------------------------------------------------------------------

    def _watch(self) -> None:
        before_s, store_lost_s = time.monotonic(), 0.0
        while not self._ended.wait(self.interval_s):
            now_s = time.monotonic()
            self._clock_s += min(now_s - before_s, max(2 * self.interval_s, 1.0))
            before_s = now_s
            try:
                failure = self._check()
                store_lost_s = 0.0
            except RuntimeError as error:  # of the store
                store_lost_s += self.interval_s
                if store_lost_s < min(self.timeout_s, 30.0):
                    continue
                text = f"rank 0 or its launcher, which holds the store, is gone: {error}"
                failure = Failure(self._rank, None, RANK_FAILURE, text)
            if failure is not None:
                self._end(failure)

    def _check(self) -> Failure | None:
        """Publish a report, and look for a failure: one published, here, or of the neighbor."""
        self._publish_report()
        if failure := self._read_failure():
            return failure
        if self._clock_s - self._progress_s > self._phase_timeout_s():
            return self._publish_failure(self._describe_hang(), RANK_FAILURE)
        if self._neighbor_is_missing() and (silent := self._silent_ranks()):
            return self._publish_failure(self._describe_silent(silent), RANK_FAILURE)
        return None

    def _phase_timeout_s(self) -> float:
        is_slow = self._heartbeat.phase in SLOW_PHASES
        return self.timeout_s * (SLOW_PHASE_FACTOR if is_slow else 1)

    def _neighbor_is_missing(self) -> bool:
        """Return whether the next rank has not reported for too long."""
        if self._world_size == 1:
            return False
        report = self._read_report((self._rank + 1) % self._world_size)
        number = report.number if report else 0
        if number != self._neighbor_report or (report and report.phase == DONE):
            self._neighbor_report, self._neighbor_s = number, self._clock_s
        timeout_s = self.timeout_s * (1 if report else SLOW_PHASE_FACTOR)  # it may still start
        return self._clock_s - self._neighbor_s > timeout_s

    def _end(self, failure: Failure) -> None:
        """End this process, whatever its main thread does."""
        # What all ranks find at the same time is printed by their main threads, given a moment.
        if self._ended.wait(0.0 if failure.status == RANK_FAILURE else SILENT_S):
            return
        _log_failure(failure, self._rank)
        if failure.status == RANK_FAILURE:
            _log(f"rank {self._rank} was in {self._heartbeat}; the stacks of its threads:")
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        end_process(failure.status)

    # --- reports ----------------------------------------------------------------------------------

    def _publish_report(self) -> None:
        if self._heartbeat.updates != self._updates:
            self._updates, self._progress_s = self._heartbeat.updates, self._clock_s
        with self._lock:
            self._report_number += 1
            report = json.dumps(asdict(self._own_report()))
            self._store.set(_REPORT.format(self._rank), report)

    def _own_report(self) -> Report:
        heartbeat = self._heartbeat
        frame = sys._current_frames().get(self._main_thread or 0)
        while frame is not None and frame.f_code.co_filename == __file__:
            frame = frame.f_back
        waits, line = False, "no Python code"
        if frame is not None:
            file, number = frame.f_code.co_filename, frame.f_lineno
            waits = any(part in file for part in _COMMUNICATION)
            waits = waits or ".wait()" in linecache.getline(file, number)
            line = _line_of(frame)
        return Report(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            number=self._report_number,
            phase=heartbeat.phase,
            step=heartbeat.step,
            updates=heartbeat.updates,
            doing=str(heartbeat),
            idle_s=round(self._clock_s - self._progress_s, 1),
            waits=waits,
            line=line,
        )

    def _read_reports(self) -> dict[int, Report]:
        found = {rank: self._read_report(rank) for rank in range(self._world_size)}
        return {rank: report for rank, report in found.items() if report is not None}

    def _read_report(self, rank: int) -> Report | None:
        key = _REPORT.format(rank)
        with self._lock:
            if not self._store.check([key]):
                return None
            return Report(**json.loads(self._store.get(key)))

    def _silent_ranks(self) -> dict[int, Report | None]:
        """Wait some intervals; return the ranks that did not report, with the last report of each.

        None for a rank that has never reported.
        """
        before = self._read_reports()
        for _ in range(self._silent_intervals):
            time.sleep(self.interval_s)
            self._publish_report()
        after = self._read_reports()
        return {
            rank: after.get(rank)
            for rank in range(self._world_size)
            if rank != self._rank and _is_silent(before.get(rank), after.get(rank))
        }

    # --- failures ---------------------------------------------------------------------------------

    def _read_failure(self) -> Failure | None:
        with self._lock:
            if not self._store.check([_FAILURE]):
                return None
            return Failure(**json.loads(self._store.get(_FAILURE)))

    def _publish_failure(self, text: str, status: int, raised_by: int | None = None) -> Failure:
        """Publish a failure unless there is one already; return the one that counts."""
        own = json.dumps(asdict(Failure(self._rank, raised_by, status, text)))
        with self._lock:
            return Failure(**json.loads(self._store.compare_set(_FAILURE, "", own)))

    def _describe_hang(self) -> str:
        """Return which ranks hang, and where."""
        if silent := self._silent_ranks():
            return self._describe_silent(silent)
        reports = [r for r in self._read_reports().values() if r.phase != DONE]
        suspects = [r for r in reports if not r.waits] or reports
        least = min((r.step, r.updates) for r in suspects)
        hanging = [r for r in suspects if (r.step, r.updates) == least]
        names = "; ".join(
            f"{r.name} hangs in {r.doing}, without progress for {r.idle_s:.0f} s, at {r.line}"
            for r in hanging[:4]
        )
        more = f"; and {len(hanging) - 4} more" if len(hanging) > 4 else ""
        return f"{names}{more} (train.hang_timeout_s={self.timeout_s:g})"

    def _describe_silent(self, silent: dict[int, Report | None]) -> str:
        texts = [
            f"{report.name} does not respond (died or stopped), last seen in {report.doing}, "
            f"at {report.line}"
            if report
            else f"rank {rank} has not started, or died before its first report"
            for rank, report in list(silent.items())[:4]
        ]
        more = [f"and {len(silent) - 4} more"] if len(silent) > 4 else []
        return "; ".join([*texts, *more])


@contextmanager
def watched(
    store: dist.Store,
    timeout_s: float,
    heartbeat: Heartbeat,
    raised_together: tuple[type[Exception], ...],
) -> Iterator[None]:
    """Run a watchdog inside; with other ranks, an error inside ends the process here.

    Args:
        store: of all ranks; the watchdog takes a connection of its own.
        timeout_s: of a step without progress; 0: there is no watchdog.
        heartbeat: of this rank.
        raised_together: errors that all ranks raise together, which pass through.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if not timeout_s:
        yield
        return
    own_store = store.clone()  # type: ignore[attr-defined]  # which torch's stub lacks
    watchdog = Watchdog(own_store, rank, world_size, timeout_s, heartbeat)
    watchdog.start()
    try:
        yield
    except raised_together:
        raise
    except Exception as error:
        if world_size > 1:
            _fail(watchdog, rank, error)
        raise
    finally:
        watchdog.close()


def _fail(watchdog: Watchdog, rank: int, error: Exception) -> None:
    """Publish an error and end the process; return where the caller is to print a user's error."""
    try:
        failure = watchdog.fail(error)
    except RuntimeError as lost:  # of the store
        text = f"rank {rank}: {error}; the store of its launcher is gone, too: {lost}"
        failure = Failure(rank, rank, RANK_FAILURE, text)
    if failure.raised_by == rank:
        if failure.status != RANK_FAILURE:
            return
        if not isinstance(error, RankError):
            _log("".join(traceback.format_exception(error)).rstrip())
    _log_failure(failure, rank)
    # Not an ordinary exit: destroying the process groups can wait for ranks that are gone.
    end_process(failure.status)


def end_process(status: int) -> None:
    """Exit at once, without cleanup, and kill all child processes."""
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
    sys.stdout.flush()
    os._exit(status)


def group_timeout(timeout_s: float) -> timedelta | None:
    """Return the timeout of process groups: longer than the watchdog's; None: torch's default."""
    return timedelta(seconds=(SLOW_PHASE_FACTOR + 1) * timeout_s) if timeout_s else None


def _is_silent(before: Report | None, after: Report | None) -> bool:
    if after is None:
        return True
    return after.phase != DONE and before is not None and before.number == after.number


def _line_of(frame: FrameType) -> str:
    """Return the line that a frame executes, by function, file and number."""
    file = Path(*Path(frame.f_code.co_filename).parts[-3:])
    return f"{frame.f_code.co_name} ({file}:{frame.f_lineno})"


def _log_failure(failure: Failure, rank: int) -> None:
    """Print a failure once per machine, and on the rank that found it: others may not live to."""
    if is_local_rank_0() or failure.reporter == rank:
        _log(f"pretrain_coe.py: error: {failure.text}")


def _log(text: str) -> None:
    os.write(2, f"{text}\n".encode())
