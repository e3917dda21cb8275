"""Train several models with several seeds on the same data and compare validation losses.

    python tools/compare.py examples/compare/moe_8-32.yaml examples/compare/coe-2_4-32.yaml \\
        --seeds 1 2 3 --directory runs/compare
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from megatron_coe.cli.command_line import required, run

with required():
    from megatron_coe.analysis.comparison import as_table, compare


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", type=Path, nargs="+", help="settings files, the baseline first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--directory", type=Path, default=Path("runs/compare"))
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="section.key=value", help="settings for all runs"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--threads", type=int, help="of each run (default: as many as there are)")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // max(1, options.jobs)) if options.threads is None else options.threads
    for name, value in (("jobs", options.jobs), ("threads", threads)):
        if value < 1:
            raise ValueError(f"--{name} {value}: give 1 or more")
    losses = compare(
        *(options.configs, options.seeds, options.directory, options.set),
        *(options.jobs, threads),
    )
    print(as_table(losses, options.seeds))


if __name__ == "__main__":
    sys.exit(run(main, "interrupted; what was trained is saved, the same command goes on"))
