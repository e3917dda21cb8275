"""Signals at every phase of a run: it ends saved, with the documented status, and resumes exactly.

    python tests/faults/run.py signals --count 28 --seed 1

All ranks must end with 75, with no completed step lost: the same command goes on from the step that
was the last one done, and ends where the unbroken run does, to the last bit.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_coe.fault_tolerance.exit_codes import PREEMPTED
from tests.faults.kills import ASYNC
from tests.faults.plants import PHASES
from tests.faults.runs import LAYOUTS, Bench, Launch, differences, last_step, resumed_step
from tests.faults.table import Outcome

COUNT = 28
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
IMPORTS, ANYWHERE, BACKGROUND, TWICE = "imports", "anywhere", "async save", "second Ctrl-C"
_ROUND = (*PHASES, BACKGROUND, ANYWHERE)


@dataclass(frozen=True)
class Signal:
    """One signal to one rank or to all."""

    seed: int
    phase: str
    signal: str
    layout: str
    everyone: bool

    @property
    def kind(self) -> str:
        return f"signal: {self.phase}"

    @property
    def name(self) -> str:
        whom = "all ranks" if self.everyone else "one rank"
        return f"{self.signal} to {whom}, {self.layout}, seed {self.seed}"


def cases(count: int = COUNT, seed: int = 1) -> list[Signal]:
    """`count` signals over all phases, and two that end a run at once."""
    draw = random.Random(seed)
    phases = [_ROUND[i % len(_ROUND)] for i in range(count - 2)]
    phases[len(_ROUND) :: 9] = [IMPORTS] * len(phases[len(_ROUND) :: 9])
    found = []
    for number, phase in enumerate([*phases, *[TWICE] * min(count, 2)]):
        pair = draw.choice(("data parallel", "expert parallel"))
        layout = pair if number % 2 == 0 and phase != IMPORTS else "one rank"
        name = "SIGINT" if phase == TWICE else SIGNALS[(number + number // 3) % 3]
        everyone = layout == "one rank" or phase == TWICE or draw.random() < 0.4
        found.append(Signal(draw.randrange(10**6), phase, name, layout, everyone))
    return found


def run_case(bench: Bench, case: Signal) -> Outcome:
    started_s = time.monotonic()
    folder = bench.folder(f"signal {case.phase} {case.name}")
    failures, notes = _run(bench, case, folder)
    seconds = time.monotonic() - started_s
    return Outcome(case.kind, case.name, tuple(failures), seconds, tuple(notes))


def _run(bench: Bench, case: Signal, folder: Path) -> tuple[list[str], list[str]]:
    unbroken = bench.unbroken(case.layout)
    draw = random.Random(case.seed)
    overrides = [ASYNC] if case.phase == BACKGROUND else []
    if case.phase == "loading":  # something to load
        with bench.start(folder, case.layout, ["train.exit_step=3"]) as launch:
            if any(launch.wait()):
                return [f"a run without faults fails: {launch.last_words()}"], []
    strike = {IMPORTS: _in_imports, ANYWHERE: _anywhere, TWICE: _twice}.get(case.phase, _in_phase)
    failures: list[str] = []
    with strike(bench, case, folder, overrides, draw) as launch:
        statuses = launch.wait()
        complaint = launch.last_words()
    marks = [path.read_text() for path in sorted(folder.glob("mark*"))]
    if case.phase in (*PHASES, BACKGROUND) and not marks:
        return [f"the phase was never entered; ended with {statuses}: {complaint}"], []
    done = last_step(folder)
    wanted = 128 + signal.SIGINT if case.phase == TWICE else PREEMPTED
    if set(statuses) != {wanted}:
        failures.append(f"ended with {statuses}, not {wanted}: {complaint}")
    with bench.start(folder, case.layout, overrides) as launch:
        if any(statuses := launch.wait()):
            failures.append(f"does not go on, {statuses}: {launch.last_words()}")
        resumed = resumed_step(launch.said())
    if case.phase != TWICE and resumed != done:
        failures.append(f"went on from step {resumed} though step {done} was done")
    return failures + differences(folder, unbroken), marks


def _in_phase(
    bench: Bench, case: Signal, folder: Path, overrides: list[str], draw: random.Random
) -> Launch:
    """Signal from inside the process, shortly after a phase has begun."""
    phase = "save" if case.phase == BACKGROUND else case.phase
    repeated = phase in ("step", "save")
    environment = {
        "FAULT_PHASE": phase,
        "FAULT_SIGNAL": case.signal,
        "FAULT_DELAY": str(draw.choice((0.0, draw.uniform(0, 0.03), draw.uniform(0, 0.3)))),
        "FAULT_NTH": str(draw.randint(1, 3) if repeated else 1),
    }
    ranks = range(LAYOUTS[case.layout][0])
    struck = ranks if case.everyone else [draw.choice(ranks)]
    environments = {rank: {**environment, "FAULT_MARK": f"{folder}/mark{rank}"} for rank in ranks}
    plants = dict.fromkeys(struck, "tests.faults.plants:signal_in_phase")
    return bench.start(folder, case.layout, overrides, plants, environments)


def _anywhere(
    bench: Bench, case: Signal, folder: Path, overrides: list[str], draw: random.Random
) -> Launch:
    """Signal from outside, at a random moment after start-up, every process or one rank."""
    launch = bench.start(folder, case.layout, overrides)
    wanted = draw.randint(0, 5)
    while (last_step(folder) < wanted and launch.running()) or not _listens(launch):
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.1))
    number = signal.Signals[case.signal]
    if case.everyone:
        for rank in launch.ranks:
            os.killpg(rank.pid, number)
    else:
        draw.choice(launch.ranks).send(number)
    return launch


def _in_imports(
    bench: Bench, case: Signal, folder: Path, overrides: list[str], draw: random.Random
) -> Launch:
    """To a process of its own, in the seconds while it imports torch and Megatron."""
    launch = bench.start_really(folder, case.layout, overrides)
    while launch.running() and not _listens(launch):
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 2.0))
    launch.ranks[0].send(signal.Signals[case.signal])
    return launch


def _twice(
    bench: Bench, case: Signal, folder: Path, overrides: list[str], draw: random.Random
) -> Launch:
    """Press Ctrl-C, and again in the same step, which is slow."""
    ranks = range(LAYOUTS[case.layout][0])
    plants = dict.fromkeys(ranks, "tests.faults.plants:stall")
    environments = {rank: {"FAULT_DELAY": "4"} for rank in ranks}
    launch = bench.start(folder, case.layout, overrides, plants, environments)
    while last_step(folder) < 1 and launch.running():
        time.sleep(0.01)
    for wait_s in (0.5, 1.5):
        time.sleep(wait_s)
        for rank in launch.ranks:
            rank.send(signal.SIGINT)
    return launch


def _listens(launch: Launch) -> bool:
    """Return whether every process catches signals by now, or has ended."""
    for rank in launch.ranks:
        if rank.poll() is not None:
            continue
        for line in Path(f"/proc/{rank.pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                caught = int(line.split()[1], 16)
                if not caught >> (signal.SIGUSR1 - 1) & 1:
                    return False
    return True
