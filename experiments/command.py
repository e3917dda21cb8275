r"""Run one of the paper's experiments: train its variants, and say whether its claim holds.

    python tools/run_experiment.py main --scale tiny --seeds 3
    python tools/run_experiment.py memory --scale small --seeds 5 --dry-run
    python tools/run_experiment.py compute --input gsm8k/train.parquet \
        --valid-input gsm8k/test.parquet --qa-keys question answer

Leaves a table (Markdown and CSV), a picture and a verdict (Markdown and JSON) in
OUTPUT/DATA/SCALE/EXPERIMENT/. Runs stand beside it and belong to all experiments: a variant that
another one trained is not trained again. Ctrl-C, SIGTERM or a crash lose nothing that is saved: the
same command resumes.
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

with required():
    from experiments.data import Data, Source, make_data
    from experiments.plans import EXPERIMENTS
    from experiments.scales import SCALES


INTERRUPTED = "interrupted; what was trained is saved, the same command resumes"


def main() -> int:
    """Run the experiment that the command line names; return an exit status."""
    # Runs are threads enough; what a library would start here could not follow into their server.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    return run(lambda: command(parse()), INTERRUPTED)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 1, 2, … (default 3)")
    add_renamed(parser, "--output", "--directory", type=Path, default=Path("runs/experiments"))
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings of all runs"
    )
    parser.add_argument("--set", nargs="+", default=[], help=argparse.SUPPRESS)
    add_renamed(parser, "--input", "--data", help="text to train on; default: generated problems")
    add_renamed(
        parser, "--valid-input", "--valid-data", help="held-out text, where --input is given"
    )
    parser.add_argument(
        "--qa-keys", nargs=2, default=["query", "response"], metavar=("QUERY", "RESPONSE")
    )
    parser.add_argument("--vocab-size", type=int, help="of the tokenizer (default: the scale's)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one a core or GPU)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default 1)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the variants, their sizes and a time, and stop",
    )
    options = parser.parse_intermixed_args()
    options.overrides += options.set
    return options


def command(options: argparse.Namespace) -> None:
    for name in ("seeds", "jobs", "threads", "vocab_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    experiment, scale = EXPERIMENTS[options.experiment], SCALES[options.scale]
    source = Source(
        options.vocab_size or scale.vocab_size, options.input, options.valid_input, options.qa_keys
    )
    source.check()
    folder = options.output / source.name
    runs_folder = folder / scale.name
    # Beyond here things are imported and made that take seconds.
    from experiments.measure import sizes_of
    from experiments.report import Outcome, sizes_table, write_report
    from megatron_coe.analysis.run_jobs import Run, last_validation_loss, train

    seeds = list(range(1, options.seeds + 1))
    data = Data.at(folder / "data")
    runs = []
    for seed in seeds:  # all variants of a seed first, so that what is there early is paired
        for variant in experiment.variants:
            name = scale.run_name(variant, seed)
            settings = scale.settings_of(variant, seed, runs_folder / name, data, options.overrides)
            runs.append(Run(name, settings))
    variants = [variant.name for variant in experiment.variants]
    of_variants = {name: runs[number :: len(variants)] for number, name in enumerate(variants)}
    firsts = {name: own[0].settings for name, own in of_variants.items()}
    sizes, machine = sizes_of(firsts, source.vocab_size)
    jobs = options.jobs or machine.jobs
    total = sum(sizes[name].flops for name in variants) * len(seeds)
    minutes = total / machine.speed / jobs / 60
    print(f"{experiment.name}: {experiment.claim}\n\n{sizes_table(experiment, sizes)}\n")
    print(
        f"{len(runs)} runs, {jobs} at a time; roughly {minutes:,.0f} min of this machine, if it "
        "has nothing else to do",
        flush=True,
    )
    for one in runs:
        one.check()
    if options.dry_run:
        return
    make_data(source, folder / "data")
    train(runs, jobs, options.threads)
    folders = {name: [run.folder for run in own] for name, own in of_variants.items()}
    losses = {name: [*map(last_validation_loss, own)] for name, own in folders.items()}
    outcome = Outcome(experiment, scale.name, seeds, sizes, folders, losses)
    written = write_report(outcome, runs_folder / experiment.name)
    print()
    for path in written:
        if path.suffix == ".md":
            print(path.read_text(encoding="utf-8"))
    for path in written:
        print(path)
