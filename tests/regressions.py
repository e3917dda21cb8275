"""Run the tests of fixed faults on a commit from before: none may pass there.

    python tests/regressions.py 777423a

tests/regressions/*.txt list them, pytest ids under a heading `# fault` each. The commit's package
and tools are laid out in a temporary folder with the tests of today; this interpreter runs them.
Prints, fault by fault, how many fail; exits with 1 if one passes or is not there today.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
LISTS = REPO / "tests" / "regressions"


def listed_tests(text: str) -> Iterator[tuple[str, str]]:
    """(fault, test id) of each entry."""
    fault = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#"):
            fault = line.lstrip("# ")
        elif line:
            yield fault, line


def outcomes_of(test: str, outcomes: dict[str, str]) -> list[str]:
    """The outcomes of a test: one, or one for each of its parameters."""
    return [
        outcome for name, outcome in outcomes.items() if name == test or name.startswith(f"{test}[")
    ]


def lay_out(commit: str, folder: Path) -> None:
    """The commit's files, with the tests of today in place of its own."""
    archive = subprocess.run(
        ["git", "-C", REPO, "archive", commit], check=True, stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    shutil.rmtree(folder / "tests")
    # Copied: what tests start is found from where they lie.
    shutil.copytree(REPO / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))


def run(tests: list[str], folder: Path) -> dict[str, str]:
    """Each test's outcome in a tree. A file that cannot be imported there ends no other."""
    outcomes = folder / "outcomes.json"
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    files = sorted({test.split("::")[0] for test in tests})
    options = [
        *("-q", "--tb=no", "--continue-on-collection-errors", "-p", "no:cacheprovider"),
        *("-n", "2", "--dist", "loadfile", "-m", "not gpu and not slurm and not bridge"),
        *(f"--rootdir={folder}", f"--outcomes={outcomes}"),
    ]
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    return json.loads(outcomes.read_text())


def main(commit: str) -> int:
    entries = [
        entry
        for path in sorted(LISTS.glob("*.txt"))
        for entry in listed_tests(path.read_text(encoding="utf-8"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        lay_out(commit, Path(folder))
        outcomes = run([test for _, test in entries], Path(folder))
    wrong = 0
    for fault in dict.fromkeys(fault for fault, _ in entries):
        tests = [test for its_fault, test in entries if its_fault == fault]
        passed = [test for test in tests if "passed" in outcomes_of(test, outcomes)]
        wrong += len(passed)
        print(f"{len(tests) - len(passed):3} of {len(tests)} fail  {fault}")
        print("".join(f"          passes: {test}\n" for test in passed), end="")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
