"""Train several models with several seeds on the same data and compare validation losses.

    coe compare compare/moe_8-32 compare/coe-2_4-32 train.eval_interval=100 \\
        --seeds 1 2 3 --output runs/compare
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_coe.cli.command_line import (
    add_renamed,
    new_parser,
    required,
    run,
)
from megatron_coe.config.presets import find_settings

with required():
    from megatron_coe.analysis.comparison import as_table, compare


INTERRUPTED = "interrupted; what was trained is saved, the same command resumes"


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: command(parse(arguments, prog)), INTERRUPTED)


def command(options: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // max(1, options.jobs)) if options.threads is None else options.threads
    for name, value in (("jobs", options.jobs), ("threads", threads)):
        if value < 1:
            raise ValueError(f"--{name} {value}: give 1 or more")
    overrides = [*(text for text in options.configs if "=" in text), *options.set]
    configs = [find_settings(text) for text in options.configs if "=" not in text]
    losses = compare(configs, options.seeds, options.output, overrides, options.jobs, threads)
    print(as_table(losses, options.seeds))


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    parser.add_argument(
        "configs",
        nargs="+",
        metavar="FILE|PRESET|section.key=value",
        help="settings files or presets, the baseline first, and settings for all runs",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add_renamed(parser, "--output", "--directory", type=Path, default=Path("runs/compare"))
    parser.add_argument("--set", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--threads", type=int, help="of each run (default: as many as there are)")
    return parser.parse_intermixed_args(arguments)
