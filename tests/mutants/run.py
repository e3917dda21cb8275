"""Plant one fault at a time in a copy of the package and see the tests catch it.

    python tests/mutants/run.py [--shard I/N] [NAME ...]

A shard is every Nth fault, from the Ith on; N of them, on as many machines, are all faults. Exit
status 0 when the tests pass without a fault and fail with each; 1 otherwise. A fault counts as
caught when tests *fail*: a run that could not even be collected proves nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from tests.mutants.faults import FAULTS, Fault  # noqa: E402

PASSED, FAILED = 0, 1  # pytest's exit statuses; anything else is neither
COPIED = (
    *("megatron_coe", "benchmarks", "experiments", "tests", "examples", "tools"),
    *("pretrain_coe.py", "pyproject.toml"),
)


def run_tests(tree: Path, tests: tuple[str, ...], *more: str) -> tuple[int, str]:
    """Run `tests` in `tree`; returns pytest's exit status and the last lines of its output."""
    environment = {
        "OMP_NUM_THREADS": "1",  # the tests' tensors are too small to share
        **os.environ,
        "PYTHONPATH": str(tree),
    }
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *more]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    done = subprocess.run(
        command,
        cwd=tree,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, "\n".join(done.stdout.splitlines()[-3:])


def copy_tree(target: Path) -> None:
    for name in COPIED:
        source = REPO / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def plant(fault: Fault, tree: Path) -> None:
    path = tree / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(
            f"{fault.name}: {fault.file} has {text.count(fault.old)} places like {fault.old!r}, "
            "not one: the source has changed, write the fault again"
        )
    path.write_text(text.replace(fault.old, fault.new))


def survives(fault: Fault) -> bool:
    """Whether the tests miss the fault; prints one line."""
    if fault.needs and find_spec(fault.needs) is None:
        print(f"{'left out':10} {fault.name:45} needs {fault.needs}", flush=True)
        return False
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        copy_tree(tree)
        plant(fault, tree)
        status, tail = run_tests(tree, fault.tests)
    verdict = {PASSED: "SURVIVED", FAILED: "caught"}.get(status, f"NOT RUN (pytest {status})")
    print(f"{verdict:10} {fault.name:45} {time.monotonic() - start:5.0f} s", flush=True)
    if status != FAILED:
        print(tail)
    return status != FAILED


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    unknown = set(options.names) - {fault.name for fault in FAULTS}
    if unknown:
        print(f"unknown faults: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    faults = select(options.names, options.shard)
    tests = tuple(sorted({test for fault in faults for test in fault.tests}))
    status, tail = run_tests(REPO, tests, "-n", "2", "--dist", "loadfile")
    if status != PASSED:
        print(f"the tests do not pass without a fault:\n{tail}")
        return 1
    missed = sum(survives(fault) for fault in faults)
    print(f"{len(faults) - missed} of {len(faults)} planted faults caught")
    return 1 if missed else 0


def select(names: list[str], shard: tuple[int, int]) -> list[Fault]:
    """Return the faults of these names (all without one) that belong to a shard."""
    index, count = shard
    return [fault for fault in FAULTS if not names or fault.name in names][index - 1 :: count]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults; all without one")
    parser.add_argument("--shard", type=shard_of, default=(1, 1), metavar="I/N")
    return parser.parse_args(arguments)


def shard_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: give I/N with 1 <= I <= N, such as 1/4")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
