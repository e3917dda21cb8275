r"""Run an experiment: train its variants, and judge its claim.

    python tools/run_experiment.py main --scale tiny --seeds 3
    python tools/run_experiment.py memory --scale small --seeds 5 --dry-run
    python tools/run_experiment.py compute --input gsm8k/train.parquet \
        --valid-input gsm8k/test.parquet --qa-keys question answer
    python tools/run_experiment.py fair --seeds 5 --results docs/experiments/fair_tiny.jsonl

`fair` compares with the standard MoE, each variant at its own learning rate; the others are the
paper's. Writes a table (Markdown and CSV), a plot and a verdict (Markdown and JSON) into
OUTPUT/DATA/SCALE/EXPERIMENT/. Runs are stored beside it and shared by all experiments: a variant
that another one trained is not trained again. Ctrl-C, SIGTERM or a crash lose nothing that is
saved: the same command resumes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_coe.cli.command_line import add_renamed, new_parser, required, run

with required():
    from experiments.data import Data, Source, make_data
    from experiments.plans import EXPERIMENTS, Experiment
    from experiments.scales import SCALES, Scale

if TYPE_CHECKING:
    from experiments.measure import Machine, Sizes
    from experiments.report import Outcome
    from megatron_coe.analysis.run_jobs import Run

INTERRUPTED = "interrupted; what was trained is saved, the same command resumes"


def main() -> int:
    """Run the experiment that the command line names; return an exit status."""
    # Threads that a library starts here would not survive the fork of the runs' server.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    return run(lambda: command(parse()), INTERRUPTED)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 1, 2, … (default 3)")
    add_renamed(parser, "--output", "--directory", type=Path, default=Path("runs/experiments"))
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings of all runs"
    )
    parser.add_argument("--set", nargs="+", default=[], help=argparse.SUPPRESS)
    add_source_arguments(parser)
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="train these alone, and judge their claims"
    )
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one a core or GPU)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default 1)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the variants, their sizes and a time, and stop",
    )
    tuned = parser.add_argument_group("experiments whose variants have learning rates of their own")
    tuned.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="JSON lines, one for each run as it ends; a run in it is not trained again (default: "
        "runs.jsonl in the experiment's folder)",
    )
    tuned.add_argument(
        "--tuning-seeds", type=int, default=2, help="seeds of the learning rates (default 2)"
    )
    tuned.add_argument(
        "--rates-from",
        type=Path,
        metavar="FILE",
        help="--results of another scale: take its learning rates, tune none",
    )
    tuned.add_argument(
        "--report", action="store_true", help="train nothing; report the seeds that are complete"
    )
    options = parser.parse_intermixed_args()
    options.overrides += options.set
    return options


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the text; `source_of` reads them."""
    add_renamed(parser, "--input", "--data", help="text to train on; default: generated problems")
    add_renamed(
        parser, "--valid-input", "--valid-data", help="held-out text, where --input is given"
    )
    parser.add_argument(
        "--qa-keys", nargs=2, default=["query", "response"], metavar=("QUERY", "RESPONSE")
    )
    parser.add_argument("--vocab-size", type=int, help="of the tokenizer (default: the scale's)")


def source_of(options: argparse.Namespace, scale: Scale) -> Source:
    """Return the text that the options name.

    Raises:
        ValueError: only one of both files is named.
        OSError: one is missing.
    """
    vocab_size = options.vocab_size or scale.vocab_size
    source = Source(vocab_size, options.input, options.valid_input, options.qa_keys)
    source.check()
    return source


def command(options: argparse.Namespace) -> None:
    """Train the variants of an experiment and write its report.

    Raises:
        ValueError: an option or a setting is invalid, or a run failed.
        OSError: a file cannot be read or written.
    """
    for name in ("seeds", "tuning_seeds", "jobs", "threads", "vocab_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    experiment, scale = EXPERIMENTS[options.experiment], SCALES[options.scale]
    if options.variants:
        experiment = experiment.restricted(options.variants)
    source = source_of(options, scale)
    folder = options.output / source.name
    train = train_tuned if experiment.tuned else train_untuned
    outcome = train(experiment, scale, source, folder, options)
    if outcome is not None:
        report(outcome, folder / scale.name / experiment.name)


def train_untuned(
    experiment: Experiment,
    scale: Scale,
    source: Source,
    folder: Path,
    options: argparse.Namespace,
) -> Outcome | None:
    """Train the variants, all at the scale's learning rate; None for a dry run."""
    if options.results or options.rates_from or options.report:
        raise ValueError(
            f"--results, --rates-from and --report do not go with {experiment.name}, whose "
            "variants share a learning rate"
        )
    # From here on imports take seconds.
    from experiments.measure import sizes_of
    from experiments.report import Outcome
    from megatron_coe.analysis import runs as recorded
    from megatron_coe.analysis.run_jobs import last_validation_loss, train

    seeds = list(range(1, options.seeds + 1))
    data = Data.at(folder / "data")
    runs = runs_of(experiment, scale, seeds, folder / scale.name, data, options.overrides)
    firsts = {name: own[0].settings for name, own in runs.items()}
    sizes, machine = sizes_of(firsts, source.vocab_size)
    # All variants of a seed before the next seed, so that unfinished experiments have pairs.
    in_order = [run for of_seed in zip(*runs.values(), strict=True) for run in of_seed]
    jobs = options.jobs or machine.jobs
    print_plan(experiment, sizes, machine, len(seeds), jobs)
    for one in in_order:
        one.check()
    if options.dry_run:
        return None
    make_data(source, folder / "data")
    train(in_order, jobs, options.threads)
    folders = {name: [run.folder for run in own] for name, own in runs.items()}
    losses = {name: [*map(last_validation_loss, own)] for name, own in folders.items()}
    read = {name: [*map(recorded.Run.read, own)] for name, own in folders.items()}
    return Outcome(experiment, scale.name, seeds, sizes, read, losses)


def train_tuned(
    experiment: Experiment,
    scale: Scale,
    source: Source,
    folder: Path,
    options: argparse.Namespace,
) -> Outcome | None:
    """Train the variants, each at its own learning rate; None for a dry run."""
    # From here on imports take seconds.
    from experiments.learning_rates import Losses, first_grid
    from experiments.measure import sizes_of
    from experiments.run_results import ResultsFile
    from experiments.tuned import Tuned, mean_losses, rates_of

    runs_folder = folder / scale.name
    results = ResultsFile(options.results or runs_folder / experiment.name / "runs.jsonl")
    tuned = Tuned(
        experiment, scale, source, Data.at(folder / "data"), runs_folder, options.overrides, results
    )
    tuning: Losses = {}
    if options.rates_from:
        if not options.rates_from.exists():
            raise ValueError(f"--rates-from {options.rates_from}: there is no such file")
        tuning = mean_losses(ResultsFile(options.rates_from).read().values())
        rates_of(tuning, experiment, str(options.rates_from))
    results.read()
    settings = {run.variant.name: run.job.settings for run in tuned.first_runs()}
    sizes, machine = sizes_of(settings, source.vocab_size)
    if options.report:
        tuning = tuning or mean_losses(results.read().values())
        return tuned.outcome(tuning, tuned.complete_seeds(tuning), sizes)
    jobs = options.jobs or machine.jobs
    of_tuning = 0 if options.rates_from else len(first_grid(1)) * options.tuning_seeds
    print_plan(experiment, sizes, machine, options.seeds + of_tuning, jobs)
    if of_tuning:
        print("more where the best learning rate lies at the end of its grid", flush=True)
    if options.dry_run:
        return None
    make_data(source, folder / "data")
    tuning = tuning or tuned.tune(options.tuning_seeds, jobs, options.threads)
    seeds = list(range(1, options.seeds + 1))
    tuned.train(tuned.report_runs(tuning, seeds), jobs, options.threads)
    return tuned.outcome(tuning, seeds, sizes)


def runs_of(
    experiment: Experiment,
    scale: Scale,
    seeds: Sequence[int],
    folder: Path,
    data: Data,
    overrides: Sequence[str],
) -> dict[str, list[Run]]:
    """Return the runs of each variant, one for each seed, in folders below `folder`."""
    from megatron_coe.analysis.run_jobs import Run

    runs: dict[str, list[Run]] = {}
    for variant in experiment.variants:
        for seed in seeds:
            name = scale.run_name(variant, seed)
            settings = scale.settings_of(variant, seed, folder / name, data, overrides)
            runs.setdefault(variant.name, []).append(Run(name, settings))
    return runs


def print_plan(
    experiment: Experiment, sizes: dict[str, Sizes], machine: Machine, seeds: int, jobs: int
) -> None:
    """Print the sizes of the variants, and an estimate of the time."""
    from experiments.report import sizes_table

    minutes = sum(of_one.flops for of_one in sizes.values()) * seeds / machine.speed / jobs / 60
    print(f"{experiment.name}: {experiment.claim}\n\n{sizes_table(experiment, sizes)}\n")
    print(
        f"{len(sizes) * seeds} runs, {jobs} at a time; roughly {minutes:,.0f} min of this machine, "
        "if it has nothing else to do",
        flush=True,
    )


def report(outcome: Outcome, folder: Path) -> None:
    """Write the report, print its Markdown parts and the paths of all."""
    from experiments.report import write_report

    written = write_report(outcome, folder)
    print()
    for path in written:
        if path.suffix == ".md":
            print(path.read_text(encoding="utf-8"))
    for path in written:
        print(path)
