"""Measure every layout of `layouts.py` against one process and print the table of docs/results.md.

    make parity        # or, one setting of each layout only: … parity_table.py --quick

Rows are layouts, columns iterations; an entry is the larger error of the loss (relative) and of any
gradient (relative to the largest entry of its tensor) with and without the distributed optimizer
and in both micro-batch sizes (quick: with it, in the larger one). Exit status 1 if any is above
1e-9.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from megatron_coe.utils.tables import markdown_table  # noqa: E402
from tests.distributed.launch import launch  # noqa: E402
from tests.distributed.layouts import BATCH, ITERATIONS, WORLDS, every_setting  # noqa: E402

TOLERANCE = 1e-9
TIME_LIMIT_S = 3600.0


# Every layout leaves threads of its groups behind, so that a launch takes some of them only.
CASES_PER_LAUNCH = 30


def main(quick: bool) -> int:
    with tempfile.TemporaryDirectory() as folder:
        launch("tests.distributed.parity:write_references", 1, list(ITERATIONS), folder)
        rows = [row for world in WORLDS for row in rows_of(world, folder, quick)]
    cells = [
        [str(world), layout, *(f"{loss:.0e} · {gradient:.0e}" for loss, gradient in errors)]
        for world, layout, errors in rows
    ]
    print(markdown_table(["ranks", "layout", *ITERATIONS], cells))
    worst = max(max(pair) for _, _, errors in rows for pair in errors)
    count = sum(len(settings_of(layout, world, quick)) for world, layout, _ in rows) * len(
        ITERATIONS
    )
    print(f"\n{count} runs of {BATCH} sequences; the largest difference is {worst:.1e}.")
    return int(not worst < TOLERANCE)


def settings_of(layout: str, world: int, quick: bool) -> list[str]:
    return every_setting(layout, world)[-1 if quick else 0 :]


def measure(cases: list[list[str]], world: int, folder: str) -> dict[str, list[float]]:
    """{"layout, variant": [error of the loss, of the worst gradient]}, in as few launches as do."""
    measured: dict[str, list[float]] = {}
    for start in range(0, len(cases), CASES_PER_LAUNCH):
        function = "tests.distributed.parity:differences"
        some = cases[start : start + CASES_PER_LAUNCH]
        measured |= launch(function, world, some, folder, timeout_s=TIME_LIMIT_S)[0]
        print(f"{world} ranks: {len(measured)} of {len(cases)}", file=sys.stderr, flush=True)
    return measured


def rows_of(
    world: int, folder: str, quick: bool
) -> list[tuple[int, str, list[tuple[float, float]]]]:
    """(ranks, layout, the worst errors for each number of iterations) of the layouts of a world."""
    cases = [
        [setting, iterations]
        for layout in WORLDS[world]
        for setting in settings_of(layout, world, quick)
        for iterations in ITERATIONS
    ]
    measured = measure(cases, world, folder)
    rows = []
    for layout in WORLDS[world]:
        errors = []
        for iterations in ITERATIONS:
            settings = settings_of(layout, world, quick)
            pairs = [measured[f"{setting}, {iterations}"] for setting in settings]
            errors.append((max(loss for loss, _ in pairs), max(worst for _, worst in pairs)))
        rows.append((world, layout, errors))
    return rows


if __name__ == "__main__":
    sys.exit(main(quick="--quick" in sys.argv[1:]))
