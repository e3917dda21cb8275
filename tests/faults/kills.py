"""kill -9 at random moments: the same command, run again, ends where the uninterrupted run does.

    python tests/faults/run.py kills --count 52 --seed 1

Half of the kills fall inside a save, which shows in the partial checkpoint that is left. Each run
is started again, and killed again up to twice, until it ends with 0. Then weights, both moments,
generators' states, position in the data and every figure of metrics.jsonl must be those of the
unbroken run, to the last bit; no start may have computed more than one save interval once more; and
nothing half written may be left.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tests.faults.runs import (
    SAVE_INTERVAL,
    STEPS,
    Bench,
    Launch,
    differences,
    in_save,
    last_step,
    newest_checkpoint,
    resumed_step,
    step_of,
    wait_for_save,
)
from tests.faults.table import Outcome

COUNT = 52
ASYNC = "checkpoint.async_save=true"
HANG_TIMEOUT_S = 10.0
SURVIVORS_S = 120.0
"""Time for the surviving ranks to notice and to end: start-up and saves have six times the timeout
of a step."""
_TRIES = 6


@dataclass(frozen=True)
class Kill:
    """A run that is killed, once or several times."""

    seed: int
    layout: str
    inside: bool
    """Inside a save, or anywhere."""
    background: bool
    """Checkpoints are written asynchronously."""
    everyone: bool
    """All ranks at once, or one of them."""
    times: int
    really: bool = False
    """As a process of its own, or under torchrun, instead of forks of the zygote."""

    @property
    def kind(self) -> str:
        where = "inside a save" if self.inside else "anywhere"
        how = "async" if self.background else "sync"
        whom = "all ranks" if self.everyone else "one rank of two"
        return f"kill -9 {where}, {how}, {whom}"

    @property
    def name(self) -> str:
        return f"{self.layout}, seed {self.seed}{', real processes' if self.really else ''}"


def cases(count: int = COUNT, seed: int = 1) -> list[Kill]:
    """Return `count` runs to kill, every other one inside a save."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        everyone = number // 4 % 2 == 0
        alone = everyone and number // 8 % 2 == 0
        pair = ("data parallel", "expert parallel")[number // 16 % 2]
        found.append(
            Kill(
                seed=draw.randrange(10**6),
                layout="one rank" if alone else pair,
                inside=number % 2 == 0,
                background=number // 2 % 2 == 1,
                everyone=everyone,
                times=1 if (really := number % 16 in (7, 8)) else draw.choice((1, 1, 2, 3)),
                really=really,
            )
        )
    return found


def run_case(bench: Bench, case: Kill) -> Outcome:
    started_s = time.monotonic()
    folder = bench.folder(f"kill {case.kind} {case.name}")
    failures, notes = _run(bench, case, folder)
    if notes:
        unbroken = bench.unbroken(case.layout)
        failures += differences(folder, unbroken)
    else:
        failures.append("the run always ended before the kill")
    return Outcome(
        case.kind, case.name, tuple(failures), time.monotonic() - started_s, tuple(notes)
    )


def _run(bench: Bench, case: Kill, folder: Path) -> tuple[list[str], list[str]]:
    """Start, kill, start again, until the end."""
    draw = random.Random(case.seed)
    failures: list[str] = []
    notes: list[str] = []
    overrides = [f"train.hang_timeout_s={HANG_TIMEOUT_S:g}"]
    overrides += [ASYNC] if case.background else []
    start = bench.start_really if case.really else bench.start
    bound = SAVE_INTERVAL * (2 if case.background else 1)
    kills = tries = 0
    while True:
        done = last_step(folder)
        with start(folder, case.layout, overrides) as launch:
            killed = (
                kills < case.times and tries < _TRIES and _kill(bench, case, folder, launch, draw)
            )
            statuses = launch.wait(SURVIVORS_S if killed else 2 * SURVIVORS_S)
            resumed = resumed_step(launch.said())
            complaint = launch.last_words()
        # One that was killed early has not printed where it resumes.
        if (resumed or not killed) and done - resumed > bound:
            failures.append(f"went on from step {resumed} though step {done} was done")
        tries += 1
        if not killed:
            if set(statuses) != {0}:
                failures.append(f"run again, it ended with {statuses}: {complaint}")
                return failures, notes
            if kills or tries >= _TRIES:
                return failures, notes
            shutil.rmtree(folder / "run")  # the run ended before the kill: try again
            continue
        done_with = newest_checkpoint(folder)
        is_over = done_with is not None and step_of(done_with) == STEPS
        if None in statuses or (0 in statuses and not is_over):
            failures.append(f"when killed, the ranks ended with {statuses}")
        struck = in_save(folder)
        notes.append("in a save" if struck else "beside a save")
        kills += struck or not case.inside or tries >= _TRIES


def _kill(bench: Bench, case: Kill, folder: Path, launch: Launch, draw: random.Random) -> bool:
    """Kill at a random moment; False when the run has ended before."""
    if case.inside:
        for _ in range(draw.randrange(3)):  # let some saves pass
            wait_for_save(folder, launch)
            while in_save(folder) and launch.running():
                time.sleep(0.001)
        if not wait_for_save(folder, launch):
            return False
        time.sleep(draw.uniform(0, 0.8 * bench.save_s))
    else:
        step = draw.randrange(
            STEPS
        )  # some moments lie before the first step, or before imports end
        while last_step(folder) < step and launch.running():
            time.sleep(0.002)
        launch.wait(draw.uniform(0, bench.run_s / (3 if step == 0 else STEPS)))
    if not launch.running():
        return False
    if case.everyone:
        launch.kill()
    else:
        try:
            os.kill(draw.choice(launch.pids()), signal.SIGKILL)
        except ProcessLookupError:  # it has ended
            return False
    return True
