"""Inject faults of all kinds into real runs, and report the outcomes in one table.

    python tests/faults/run.py [KIND ...] [--seed N] [--count N]

Exit status 0 when every fault was survived or caught as docs/reliability.md promises, 1 when one
was missed, 130 after Ctrl-C (with the table of what was done). Every case is drawn from the seed;
`--only PART` repeats those whose name has that part. Everything happens in a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from tests.faults import commands, hangs, hostile, kills, malformed, mutations, signals  # noqa: E402
from tests.faults.runs import Bench, bench  # noqa: E402
from tests.faults.table import Outcome, render, rows  # noqa: E402
from tests.zygote import Zygote  # noqa: E402

OPTIMIZED = " under -O"


@dataclass(frozen=True)
class Job:
    """A case and how to run it."""

    name: str
    run: Callable[[], Outcome]


class Harness:
    """The fixtures of the kinds of faults, made when first needed."""

    def __init__(self, work: Path, seed: int, count: int | None) -> None:
        self._work = work
        self._seed = seed
        self._count = count
        self._bench: Bench | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def jobs(self, kind: str) -> Iterator[Job]:
        """Of the cases of a kind."""
        if kind in ("hostile", "malformed", f"malformed{OPTIMIZED}"):
            return self._command_lines(kind)
        return getattr(self, f"_{kind}")()

    def _kills(self) -> Iterator[Job]:
        for case in kills.cases(self._count or kills.COUNT, self._seed):
            yield Job(f"{case.kind} {case.name}", partial(kills.run_case, self.bench, case))

    def _signals(self) -> Iterator[Job]:
        for case in signals.cases(self._count or signals.COUNT, self._seed):
            yield Job(f"{case.kind} {case.name}", partial(signals.run_case, self.bench, case))

    def _mutations(self) -> Iterator[Job]:
        stage = mutations.Stage(self.bench)
        for case in mutations.cases(self._count or mutations.COUNT, self._seed):
            run = partial(mutations.run_case, self.bench, stage, case)
            yield Job(f"{case.kind} {case.name}", run)

    def _hangs(self) -> Iterator[Job]:
        for case in hangs.cases()[: self._count]:
            yield Job(f"{case.kind} {case.name}", partial(hangs.run_case, self.bench, case))

    def _command_lines(self, kind: str) -> Iterator[Job]:
        optimized = {"PYTHONOPTIMIZE": "1"} if kind.endswith(OPTIMIZED) else {}
        zygote = self._stack.enter_context(Zygote(REPO, optimized))
        place = commands.Bench(zygote, self._work / kind.replace(" ", "_"))
        for case in (hostile if kind == "hostile" else malformed).cases()[: self._count]:

            def run(case: commands.Case = case) -> Outcome:
                started_s = time.monotonic()
                problem = commands.run_case(place, case)
                failures = (problem,) if problem else ()
                return Outcome(f"{kind} input", case.name, failures, time.monotonic() - started_s)

            yield Job(f"{kind} {case.name}", run)

    @property
    def bench(self) -> Bench:
        if self._bench is None:
            self._bench = self._stack.enter_context(bench(self._work / "runs"))
            self._bench.unbroken("one rank")  # measures how long things take
        return self._bench


KINDS = ("mutations", "signals", "kills", "hangs", "hostile", "malformed", f"malformed{OPTIMIZED}")


def main() -> int:
    options = _parse()
    # One thread per process: tensors of this size are not worth waking another.
    os.environ["OMP_NUM_THREADS"] = "1"
    outcomes: list[Outcome] = []
    started_s = time.monotonic()
    status = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing behind either way
    seldom_s = 0.1 if sys.stderr.isatty() else 30.0
    try:
        with (
            tempfile.TemporaryDirectory(prefix="faults-") as work,
            Harness(Path(work), options.seed, options.count) as harness,
        ):
            for kind in options.kinds or KINDS:
                jobs = [job for job in harness.jobs(kind) if options.only in job.name]
                for job in tqdm(jobs, desc=kind, unit="fault", mininterval=seldom_s):
                    outcome = _run(kind, job)
                    outcomes.append(outcome)
                    for failure in outcome.failures:
                        tqdm.write(f"MISSED {job.name}: {failure}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    minutes = (time.monotonic() - started_s) / 60
    print(render(rows(outcomes)))
    print(f"\nseed {options.seed}, {minutes:.1f} minutes")
    missed = any(outcome.failures for outcome in outcomes)
    return status or int(missed)


def _run(kind: str, job: Job) -> Outcome:
    """Run a case; an error of the harness counts as a missed fault, and ends nothing."""
    started_s = time.monotonic()
    try:
        return job.run()
    except Exception as error:
        traceback.print_exc()
        failure = f"the harness failed: {type(error).__name__}: {error}"
        return Outcome(f"{kind}: not judged", job.name, (failure,), time.monotonic() - started_s)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, help="cases of each kind (default: as many as told)")
    parser.add_argument("--only", default="", metavar="PART", help="cases with this in their name")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"unknown kind {min(unknown)!r}; there are {', '.join(KINDS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
