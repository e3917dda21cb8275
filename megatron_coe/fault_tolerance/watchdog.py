"""Ends a run in which a rank hangs, dies or fails: all ranks, in bounded time, and it is named.

A thread of each rank tells the others through a store, every beat, what its rank is doing. It needs
neither the main thread nor the device, so a rank that hangs in a collective goes on telling. A rank
that makes no progress for too long, or whose neighbor is no longer heard of, or that raises an
error, draws a verdict; the first verdict counts, and every rank that reads it ends.

Who is to blame: a rank that is not heard of (killed, stopped, its machine gone); among those that
are, one that does not wait for others; of several, the one that has come least far.
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

from megatron_coe.fault_tolerance.exceptions import DeviceMemoryError
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

STARTING = (START, DATA, MODEL, LOADING)
LONG_PHASES = (*STARTING, SAVING)
LONG = 6
"""How many times as long as a step those may go without progress."""
BEATS = 20
"""In the time that a step may go without progress."""
SHORTEST_BEAT_S, LONGEST_BEAT_S = 0.1, 2.0
SILENT_BEATS, SILENT_S = 4, 2.0
"""A rank that is asked after, and not heard of for so many beats and seconds, is silent."""
_VERDICT, _REPORT = "watchdog/verdict", "watchdog/rank_{}"
_COMMUNICATION = ("/torch/distributed/", "/pipeline_parallel/p2p_communication.py")
_BROKEN_LINK = ("gloo", "Connection", "connection", "NCCL", "peer", "Socket", "recv", "Timed out")


@dataclass(frozen=True)
class Report:
    """What a rank tells of itself."""

    rank: int
    host: str
    pid: int
    beat: int
    phase: str
    step: int
    marks: int
    doing: str
    """Describe the activity in words."""
    idle_s: float
    """Seconds since the latest sign of progress."""
    waits: bool
    """Whether the main thread is in a communication with other ranks, as far as one sees."""
    line: str
    """Where the main thread is."""

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends, the same for all ranks."""

    giver: int
    """The rank that has found it out."""
    culprit: int | None
    """The rank whose main thread raised an error; None: it is told from outside."""
    status: int
    text: str


class Watchdog:
    """Of one rank, in a thread of its own.

    Args:
        store: a connection of its own, which nothing else uses.
        timeout_s: without progress, before a verdict.
        heartbeat: of this rank.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, timeout_s: float, heartbeat: Heartbeat
    ) -> None:
        self.timeout_s = timeout_s
        self.beat_s = min(max(timeout_s / BEATS, SHORTEST_BEAT_S), LONGEST_BEAT_S)
        self._silent_beats = max(SILENT_BEATS, math.ceil(SILENT_S / self.beat_s))
        self._store = store
        self._rank, self._world_size = rank, world_size
        self._heartbeat = heartbeat
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._beat = 0
        self._clock_s = 0.0
        """Counts only while this process runs: one that was stopped blames nobody for that time."""
        self._marks, self._progress_s = -1, 0.0
        self._neighbor_beat, self._neighbor_s = -1, 0.0
        self._said_s: float | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._tell()
        self._thread.start()

    def close(self) -> None:
        """This rank is done, and is not missed."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._heartbeat.enter(DONE)
        with suppress(RuntimeError):  # the others may be gone, and the store with them
            self._tell()

    def fail(self, error: Exception) -> Verdict:
        """What has ended this rank's main thread, told to all: this error, or what caused it."""
        self._ended.set()  # from here on the main thread speaks
        self._thread.join()
        # The other end of a link that breaks has died, if it has not told why it will.
        is_broken_link = any(word in str(error) for word in _BROKEN_LINK)
        if is_broken_link and not self._read_verdict() and (silent := self._silent()):
            return self._pronounce(self._text_of_silence(silent), RANK_FAILURE)
        own = Report(**self._report())
        starts = own.phase in STARTING and isinstance(error, (ValueError, OSError))
        if starts or isinstance(error, DataError):
            text = f"rank {self._rank} ({own.host}): {error}"
            return self._pronounce(text, CONFIG_ERROR, culprit=self._rank)
        if isinstance(error, DeviceMemoryError):
            return self._pronounce(f"{own.name}: {error}", RANK_FAILURE, culprit=self._rank)
        status = NOT_WRITTEN if isinstance(error, OSError) else RANK_FAILURE
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        text = f"{own.name} failed in {own.doing}: {what}"
        return self._pronounce(text, status, culprit=self._rank)

    # --- the thread -------------------------------------------------------------------------------

    def _watch(self) -> None:
        before_s, lost_s = time.monotonic(), 0.0
        while not self._ended.wait(self.beat_s):
            now_s = time.monotonic()
            self._clock_s += min(now_s - before_s, max(2 * self.beat_s, 1.0))
            before_s = now_s
            try:
                verdict = self._look()
                lost_s = 0.0
            except RuntimeError as error:  # of the store
                lost_s += self.beat_s
                if lost_s < min(self.timeout_s, 30.0):
                    continue
                text = f"rank 0 or its launcher, which keeps the store, has gone: {error}"
                verdict = Verdict(self._rank, None, RANK_FAILURE, text)
            if verdict is not None:
                self._end(verdict)

    def _look(self) -> Verdict | None:
        self._tell()
        if verdict := self._read_verdict():
            return verdict
        if self._clock_s - self._progress_s > self._patience_s():
            return self._pronounce(self._blame(), RANK_FAILURE)
        if self._neighbor_is_missing() and (silent := self._silent()):
            return self._pronounce(self._text_of_silence(silent), RANK_FAILURE)
        return None

    def _patience_s(self) -> float:
        return self.timeout_s * (LONG if self._heartbeat.phase in LONG_PHASES else 1)

    def _tell(self) -> None:
        if self._heartbeat.marks != self._marks:
            self._marks, self._progress_s = self._heartbeat.marks, self._clock_s
        with self._lock:
            self._beat += 1
            self._store.set(_REPORT.format(self._rank), json.dumps(self._report()))

    def _report(self) -> dict[str, object]:
        heartbeat = self._heartbeat
        frame = sys._current_frames().get(self._main)
        while frame is not None and frame.f_code.co_filename == __file__:
            frame = frame.f_back
        waits, line = False, "no Python code"
        if frame is not None:
            file, number = frame.f_code.co_filename, frame.f_lineno
            waits = any(part in file for part in _COMMUNICATION)
            waits = waits or ".wait()" in linecache.getline(file, number)
            line = _line_of(frame)
        return asdict(
            Report(
                self._rank,
                socket.gethostname(),
                os.getpid(),
                self._beat,
                heartbeat.phase,
                heartbeat.step,
                heartbeat.marks,
                str(heartbeat),
                round(self._clock_s - self._progress_s, 1),
                waits,
                line,
            )
        )

    # --- verdicts ---------------------------------------------------------------------------------

    def _read_verdict(self) -> Verdict | None:
        with self._lock:
            if not self._store.check([_VERDICT]):
                return None
            return Verdict(**json.loads(self._store.get(_VERDICT)))

    def _pronounce(self, text: str, status: int, culprit: int | None = None) -> Verdict:
        """Make it the verdict, unless there is one already; whichever counts."""
        own = json.dumps(asdict(Verdict(self._rank, culprit, status, text)))
        with self._lock:
            return Verdict(**json.loads(self._store.compare_set(_VERDICT, "", own)))

    def _end(self, verdict: Verdict) -> None:
        """End this process, whatever its main thread does."""
        # What all ranks find at the same time is said by their main threads, given a moment.
        if self._ended.wait(0.0 if verdict.status == RANK_FAILURE else SILENT_S):
            return
        _say_verdict(verdict, self._rank)
        if verdict.status == RANK_FAILURE:
            _say(f"rank {self._rank} was in {self._heartbeat}; the stacks of its threads:")
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        end_process(verdict.status)

    def _blame(self) -> str:
        silent = self._silent()
        if silent:
            return self._text_of_silence(silent)
        reports = [r for r in self._reports().values() if r.phase != DONE]
        suspects = [r for r in reports if not r.waits] or reports
        least = min((r.step, r.marks) for r in suspects)
        culprits = [r for r in suspects if (r.step, r.marks) == least]
        names = "; ".join(
            f"{r.name} hangs in {r.doing}, without progress for {r.idle_s:.0f} s, at {r.line}"
            for r in culprits[:4]
        )
        more = f"; and {len(culprits) - 4} more" if len(culprits) > 4 else ""
        return f"{names}{more} (train.hang_timeout_s={self.timeout_s:g})"

    def _neighbor_is_missing(self) -> bool:
        """Whether the next rank has not been heard of for too long."""
        if self._world_size == 1:
            return False
        report = self._report_of((self._rank + 1) % self._world_size)
        beat = report.beat if report else 0
        if beat != self._neighbor_beat or (report and report.phase == DONE):
            self._neighbor_beat, self._neighbor_s = beat, self._clock_s
        patience = self.timeout_s * (1 if report else LONG)  # it may not have started yet
        return self._clock_s - self._neighbor_s > patience

    def _silent(self) -> dict[int, Report | None]:
        """The ranks that are not heard of while one listens, with the last word of each."""
        before = self._reports()
        for _ in range(self._silent_beats):
            time.sleep(self.beat_s)
            self._tell()
        after = self._reports()
        return {
            rank: after.get(rank)
            for rank in range(self._world_size)
            if rank != self._rank and _is_silent(before.get(rank), after.get(rank))
        }

    def _reports(self) -> dict[int, Report]:
        found = {rank: self._report_of(rank) for rank in range(self._world_size)}
        return {rank: report for rank, report in found.items() if report is not None}

    def _report_of(self, rank: int) -> Report | None:
        key = _REPORT.format(rank)
        with self._lock:
            if not self._store.check([key]):
                return None
            return Report(**json.loads(self._store.get(key)))

    def _text_of_silence(self, silent: dict[int, Report | None]) -> str:
        said = [
            f"{report.name} has died or was stopped, last heard of in {report.doing}, "
            f"at {report.line}"
            if report
            else f"rank {rank} has not started, or died before it was heard of"
            for rank, report in list(silent.items())[:4]
        ]
        more = [f"and {len(silent) - 4} more"] if len(silent) > 4 else []
        return "; ".join([*said, *more])


@contextmanager
def watched(
    store: dist.Store, timeout_s: float, heartbeat: Heartbeat, agreed: tuple[type[Exception], ...]
) -> Iterator[None]:
    """Watches over what is inside; with other ranks, an error inside ends the process here.

    Args:
        timeout_s: 0: nothing is watched.
        agreed: errors that all ranks raise together.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if not timeout_s:
        yield
        return
    watchdog = Watchdog(store.clone(), rank, world_size, timeout_s, heartbeat)
    watchdog.start()
    try:
        yield
    except agreed:
        raise
    except Exception as error:
        if world_size > 1:
            _fail(watchdog, rank, error)
        raise
    finally:
        watchdog.close()


def _fail(watchdog: Watchdog, rank: int, error: Exception) -> None:
    """Tell the others, and end this rank unless it has found a user's mistake, for the caller to
    say."""
    try:
        verdict = watchdog.fail(error)
    except RuntimeError as lost:  # there is no store left to ask
        text = f"rank {rank}: {error}; its launcher's store is gone too: {lost}"
        verdict = Verdict(rank, rank, RANK_FAILURE, text)
    if verdict.culprit == rank:
        if verdict.status != RANK_FAILURE:
            return
        if not isinstance(error, DeviceMemoryError):
            _say("".join(traceback.format_exception(error)).rstrip())
    _say_verdict(verdict, rank)
    # Not the ordinary way out: taking down the process groups can wait for those that are gone.
    end_process(verdict.status)


def end_process(status: int) -> None:
    """At once, and with it whatever it has started."""
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
    sys.stdout.flush()
    os._exit(status)


def group_timeout(timeout_s: float) -> timedelta | None:
    """How long a process group waits: longer than any verdict takes; None: torch's default."""
    return timedelta(seconds=(LONG + 1) * timeout_s) if timeout_s else None


def _is_silent(before: Report | None, after: Report | None) -> bool:
    if after is None:
        return True
    return after.phase != DONE and before is not None and before.beat == after.beat


def _line_of(frame: FrameType) -> str:
    """The line that is being run, by function, file and number."""
    file = Path(*Path(frame.f_code.co_filename).parts[-3:])
    return f"{frame.f_code.co_name} ({file}:{frame.f_lineno})"


def _say_verdict(verdict: Verdict, rank: int) -> None:
    """Once per machine, and by whoever knows it first, for the others may not live to."""
    if is_local_rank_0() or verdict.giver == rank:
        _say(f"pretrain_coe.py: error: {verdict.text}")


def _say(text: str) -> None:
    os.write(2, f"{text}\n".encode())
