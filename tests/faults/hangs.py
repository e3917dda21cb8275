"""Ranks that hang, stop or die, and values that are not finite: named, and nothing is applied.

    python tests/faults/run.py hangs

Every rank ends with the documented status within the set timeout, and the message names the rank
that is to blame. What is not finite ends the run with a report of step, rank, layer and iteration
(or is skipped, as often as allowed); the same command without the fault ends where the unbroken run
does, to the last bit, because nothing of the faulty step was applied.
"""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_coe.fault_tolerance.exit_codes import NOT_FINITE, RANK_FAILURE
from tests.faults.runs import Bench, Launch, differences, last_step
from tests.faults.table import Outcome

HANG_TIMEOUT_S = 6.0
_SLACK_S = 60.0
"""Allowance for a busy machine."""
AFTER_STEP = 3


@dataclass(frozen=True)
class Fault:
    """A fault of one rank, some steps into the run."""

    kind: str
    what: str
    layout: str
    rank: int
    really: bool = False
    """Under torchrun."""

    @property
    def name(self) -> str:
        how = ", torchrun" if self.really else ""
        return f"{self.what}, rank {self.rank} of {self.layout}{how}"


STOPPED, KILLED, LOOPS, RAISES = "hang: stopped", "crash: killed", "hang: loops", "crash: raises"
NAN = "not finite"
_PLANTS = {LOOPS: "loop", RAISES: "fail"}


def cases() -> list[Fault]:
    pairs = ("data parallel", "expert parallel")
    found = [
        Fault(kind, kind.split(": ")[1], pairs[rank], rank)
        for kind in (STOPPED, KILLED, LOOPS, RAISES)
        for rank in (0, 1)
    ]
    found += [Fault(LOOPS, "loops", "one rank", 0)]
    found += [Fault(KILLED, "killed", "data parallel", rank, really=True) for rank in (0, 1)]
    found += [
        Fault(NAN, what, layout, rank)
        for what, layout, rank in (
            ("NaN in the output of an expert pass", "one rank", 0),
            ("Inf in the output of an expert pass", "expert parallel", 1),
            ("NaN in a gradient", "one rank", 0),
            ("NaN in a gradient", "data parallel", 1),
            ("Inf in a gradient", "expert parallel", 0),
        )
    ]
    return found


def run_case(bench: Bench, case: Fault) -> Outcome:
    started_s = time.monotonic()
    folder = bench.folder(f"fault {case.kind} {case.name}")
    failures = (_not_finite if case.kind == NAN else _lost)(bench, case, folder)
    with bench.start(folder, case.layout, _overrides(case)) as launch:
        if any(statuses := launch.wait()):
            failures.append(f"does not go on, {statuses}: {launch.last_words()}")
    failures += differences(folder, bench.unbroken(case.layout))
    return Outcome(case.kind, case.name, tuple(failures), time.monotonic() - started_s)


def _overrides(case: Fault) -> list[str]:
    return [] if case.kind == NAN else [f"train.hang_timeout_s={HANG_TIMEOUT_S:g}"]


def _lost(bench: Bench, case: Fault, folder: Path) -> list[str]:
    """Run a case in which a rank hangs or dies."""
    plant = _PLANTS.get(case.kind)
    plants = {case.rank: f"tests.faults.plants:{plant}"} if plant else {}
    environments = {case.rank: {"FAULT_STEP": str(AFTER_STEP + 1)}} if plant else {}
    start = bench.start_really if case.really else bench.start
    extra = () if case.really else (plants, environments)
    with start(folder, case.layout, _overrides(case), *extra) as launch:
        while last_step(folder) < AFTER_STEP and launch.running():
            time.sleep(0.005)
        struck_s = time.monotonic()
        if not plant:
            _strike(case, launch)
        statuses = _statuses(case, launch)
        lasted_s = time.monotonic() - struck_s
        complaint = launch.complained()
    failures = []
    if case.really:  # torchrun ends the others and reports for them
        if statuses[0] in (0, None):
            failures.append(f"torchrun ended with {statuses}")
    else:
        wanted = [RANK_FAILURE] * len(statuses)
        if case.kind == KILLED:
            wanted[case.rank] = -signal.SIGKILL
        if statuses != wanted:
            failures.append(f"ended with {statuses}, not {wanted}: {launch.last_words()}")
        named = rf"rank {case.rank} (\([^)]*\) (hangs|does not respond|failed))"
        if not re.search(named, complaint):
            failures.append(f"rank {case.rank} is not named: {launch.last_words()}")
    limit_s = 2 * HANG_TIMEOUT_S + _SLACK_S
    if lasted_s > limit_s:
        failures.append(f"ended only after {lasted_s:.0f} s (limit {limit_s:.0f})")
    return failures


def _strike(case: Fault, launch: Launch) -> None:
    number = signal.SIGSTOP if case.kind == STOPPED else signal.SIGKILL
    os.kill(launch.pids()[case.rank], number)


def _statuses(case: Fault, launch: Launch) -> list[int | None]:
    """Return how the ranks end; one that is stopped cannot, until it is continued."""
    if case.kind != STOPPED:
        return launch.wait()
    others = [p for rank, p in enumerate(launch.ranks) if rank != case.rank]
    for process in others:
        process.wait(2 * HANG_TIMEOUT_S + _SLACK_S)
    psutil.Process(launch.ranks[case.rank].pid).resume()
    return launch.wait()


def _not_finite(bench: Bench, case: Fault, folder: Path) -> list[str]:
    """Run a case in which one rank computes a value that is not finite, once."""
    value, place = case.what.split(" in ")
    environment = {
        "FAULT_STEP": str(AFTER_STEP + 1),
        "FAULT_VALUE": value,
        "FAULT_PLACE": "gradient" if "gradient" in place else "output",
    }
    plants = {case.rank: "tests.faults.plants:not_finite"}
    with bench.start(folder, case.layout, [], plants, {case.rank: environment}) as launch:
        statuses = launch.wait()
        complaint = launch.complained()
    failures = []
    if set(statuses) != {NOT_FINITE}:
        failures.append(f"ended with {statuses}, not {NOT_FINITE}: {launch.last_words()}")
    wanted = [rf"step {AFTER_STEP + 1}\b", rf"rank {case.rank}\b", r"layer 2\b"]
    if "output" in place:
        wanted.append(r"iteration 1\b")
    failures += [
        f"does not name {pattern!r}: {launch.last_words()}"
        for pattern in wanted
        if not re.search(pattern, complaint)
    ]
    if last_step(folder) != AFTER_STEP:
        failures.append(f"step {last_step(folder)} was reported, not {AFTER_STEP}")
    return failures
