"""Compare which tests pass under the two lines of Megatron-Core.

    python -m pytest … --outcomes=0.16.json       in the environment of each line
    python tests/engine_lines.py 0.16.json 0.19.json

Of the files that ran under both, a test that passes under one line only must be listed, with its
reason, in tests/engine_lines.txt, and whatever is listed there must differ. Exits with 1 otherwise.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

LISTED = Path(__file__).with_suffix(".txt")
LINES = ("0.16", "0.19")


def listed_differences(text: str) -> Iterator[tuple[str, str]]:
    """(line that alone passes, pattern of test ids) of each entry; comments are the reasons."""
    for entry in text.splitlines():
        if entry.strip() and not entry.startswith("#"):
            line, pattern = entry.split(maxsplit=1)
            # Brackets stand for themselves: they enclose parameters.
            yield line, pattern.replace("[", "[[]")


def compare(outcomes: dict[str, dict[str, str]], listed: list[tuple[str, str]]) -> list[str]:
    """What is wrong: differences that are not listed, and entries without a difference.

    Args:
        outcomes: by line, each test's id and outcome.
    """
    files = [{name.split("::")[0] for name in outcomes[line]} for line in LINES]
    common = files[0] & files[1]
    passed = {
        line: {
            name
            for name, outcome in outcomes[line].items()
            if outcome == "passed" and name.split("::")[0] in common
        }
        for line in LINES
    }
    faults, met = [], set()
    for line, other in (LINES, LINES[::-1]):
        for name in sorted(passed[line] - passed[other]):
            entries = [e for e in listed if e[0] == line and fnmatchcase(name, e[1])]
            met.update(entries)
            if not entries:
                state = outcomes[other].get(name, "not there")
                faults.append(f"passes under {line} only ({other}: {state}): {name}")
    for line, pattern in listed:
        here = any(fnmatchcase(file, pattern.split("::")[0]) for file in common)
        if here and (line, pattern) not in met:
            faults.append(f"listed, but no difference: {line} {pattern.replace('[[]', '[')}")
    return faults


def main(paths: list[str]) -> int:
    outcomes = {
        line: json.loads(Path(path).read_text()) for line, path in zip(LINES, paths, strict=True)
    }
    for line in LINES:
        counts = Counter(outcomes[line].values())
        print(f"megatron-core {line}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    faults = compare(outcomes, list(listed_differences(LISTED.read_text())))
    print("\n".join(faults) or "the lines differ by what tests/engine_lines.txt lists, no more")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
