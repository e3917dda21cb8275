"""Benchmark time and memory of CoE beside a standard MoE, other frameworks and the ceiling.

    python tools/benchmark.py --what all --threads 1 --clock processor --output runs/benchmark.json
    python tools/benchmark.py --what step layer --vary model.bias_activation_fusion=on,off
    python tools/benchmark.py --what step memory --against ../megatron_coe-0.1
    python tools/benchmark.py --quick --against ../megatron_coe-0.1 --te-path te
    torchrun --nproc-per-node 2 tools/benchmark.py --what parallel

Variants of a benchmark take turns in one process; docs/performance.md describes the benchmarks.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_coe.cli.command_line import new_parser, required, run
from megatron_coe.utils.files import check_writable

with required():
    from benchmarks.scale import SCALES

if TYPE_CHECKING:
    import torch

    from benchmarks.suite import Harness

REPOSITORY = Path(__file__).resolve().parents[1]

BENCHMARKS = {
    "kernels": "linear_kernels",
    "experts": "experts",
    "layer": "layer",
    "head": "output_head",
    "step": "step",
    "matched": "matched",
    "transformers": "transformers",
    "memory": "peak_memory",
    "host_syncs": "host_syncs",
    "tiles": "expert_tiles",
    "te": "te_parts",
    "parallel": "parallel",
    "long": "long",
}
"""Name -> function of `benchmarks.suite`, which takes seconds to import."""

ALL = tuple(name for name in BENCHMARKS if name not in ("tiles", "te", "parallel", "long"))
"""The benchmarks of `--what all`: those of one process that take minutes and can run anywhere."""

FORMER_NAMES = {"synchronisations": "host_syncs"}  # codespell:ignore synchronisations
SIZES = ("sequences", "seq_length", "num_layers", "vocab_size")
"""Options that change one size of the scale."""

BOOLEANS = {"on": "true", "off": "false"}


def main() -> int:
    """Run the benchmarks that the command line names; return an exit status."""
    return run(lambda: command(parse()), interrupted="interrupted")


def command(options: argparse.Namespace) -> None:
    """Run the benchmarks that the options name, and report them on rank 0."""
    if options.quick or options.against:
        return run_processes(options)
    # Only now, because they take seconds.
    import torch

    from megatron_coe.config.run_config import ParallelSettings
    from megatron_coe.config.validation import world_size
    from megatron_coe.distributed.process_groups import process_groups
    from megatron_coe.model import backends

    if options.threads:
        torch.set_num_threads(options.threads)
    device = backends.prepare()
    harness = build_harness(options, device)
    harness.check()
    with process_groups(ParallelSettings(expert_model_parallel_size=world_size()), device):
        run_benchmarks(options, harness)


def run_processes(options: argparse.Namespace) -> None:
    """Run benchmarks in processes of their own: `--against` another checkout, or `--quick`."""
    import torch

    from benchmarks import report
    from benchmarks.against import Side, compare
    from benchmarks.quick import Quick

    common, seconds = arguments_of(options), options.seconds
    if options.quick:
        quick = Quick(REPOSITORY, common, options.against, options.te_path, seconds, options.output)
        quick.run()
        tables = [*quick.tables, report.target_table(quick.figures, torch.cuda.is_available())]
        tables += [f"{part}: not measured: {why}" for part, why in quick.missing.items()]
        print("\n\n".join(tables))
        return
    other, this = Side(str(options.against), options.against), Side("this commit", REPOSITORY)
    arguments = ["--what", *options.what, *common]
    comparison = compare(other, this, arguments, REPOSITORY, options.turns, seconds)
    print(comparison.markdown())
    if options.output:
        documents = [document for pair in comparison.pairs for document in pair]
        report.write_processes(options.output, {"against": documents})


def arguments_of(options: argparse.Namespace) -> list[str]:
    """Return the arguments that every process of a comparison gets, which former versions take."""
    names = ("scale", "rounds", "warmup", "profiles", "threads", "clock", *SIZES)
    given = {name: getattr(options, name) for name in names}
    words = [
        word
        for name, value in given.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    return [*words, *(("--set", *options.overrides) if options.overrides else ())]


def run_benchmarks(options: argparse.Namespace, harness: Harness) -> None:
    """Run the benchmarks one after another; each one's results are shown and saved at once."""
    from benchmarks import report, suite
    from megatron_coe.utils.environment import commit, versions
    from megatron_coe.utils.ranks import is_rank_0

    heading: dict[str, object] = {
        "commit": commit(REPOSITORY),
        "machine": report.machine(harness.device),
        "versions": versions(),
        "options": vars(options),
    }
    if is_rank_0():
        print("\n".join(f"{name}: {value}" for name, value in heading.items()), flush=True)
    outcomes: list[report.Outcome] = []
    for name in ALL if "all" in options.what else options.what:
        benchmark = getattr(suite, BENCHMARKS[FORMER_NAMES.get(name, name)])
        outcomes.append(benchmark(harness))
        if is_rank_0():
            print("\n" + outcomes[-1].markdown(), flush=True)
            if options.output:
                report.write_json(options.output, heading, outcomes)
    if is_rank_0() and not options.vary:
        ratios = {k: v for outcome in outcomes for k, v in outcome.figures.items()}
        print("\n" + report.target_table(ratios, harness.device.type == "cuda"))


def parse() -> argparse.Namespace:
    """Parse and check the command line.

    Raises:
        ValueError: options are out of range or contradict each other.
        OSError: the output cannot be written.
    """
    options = new_argument_parser().parse_intermixed_args()
    options.overrides += options.set
    options.vary = setting_variants_of(options.vary)
    check(options)
    return options


def new_argument_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--what",
        "-w",
        nargs="+",
        choices=("all", *BENCHMARKS, *FORMER_NAMES),
        default=["all"],
        help="benchmarks; all: all but tiles, te, parallel and long",
    )
    parser.add_argument(
        "--scale", choices=SCALES, help="sizes (default: paper on a GPU, cpu without)"
    )
    parser.add_argument("--rounds", type=int, default=None, help="default: 50 on a GPU, else 10")
    parser.add_argument("--warmup", type=int, default=2, help="uncounted rounds")
    parser.add_argument("--profiles", type=int, default=3, help="profiled runs of each variant")
    parser.add_argument("--steps", type=int, default=1000, help="of the benchmark long")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="on a CPU; processor: this process's own time, for one thread on a shared machine",
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="SECTION.KEY=A,B",
        help="compare CoE-2(4/64) with these values of a setting (on and off are true and false)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings for every variant, as coe train takes them",
    )
    parser.add_argument("--set", nargs="+", default=[], help=argparse.SUPPRESS)
    for name in SIZES:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, help="instead of the scale's")
    parser.add_argument(
        "--presets", type=Path, default=REPOSITORY / "examples/paper", help="the paper's models"
    )
    parser.add_argument("--output", type=Path, help="JSON file with every sample")
    _add_processes(parser)
    return parser


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes of their own, that alternate on the device")
    group.add_argument(
        "--against", type=Path, metavar="DIR", help="another checkout, which runs the same"
    )
    group.add_argument("--turns", type=int, default=2, help="processes of each side")
    group.add_argument(
        "--quick",
        action="store_true",
        help="the targets' rows, in four minutes on one GPU; those of another commit by --against",
    )
    group.add_argument(
        "--te-path", type=Path, metavar="DIR", help="folder with Transformer Engine, for --quick"
    )
    group.add_argument(
        "--seconds", type=float, help="limit of --quick (240), or of each process (none)"
    )


LEAST = {
    "turns": 1,
    "warmup": 0,
    "profiles": 0,
    "rounds": 1,
    "steps": 1,
    "threads": 1,
    "sequences": 1,
    "num_layers": 1,
    "vocab_size": 1,
    "seq_length": 2,
}
"""The least values of numeric options."""


def check(options: argparse.Namespace) -> None:
    """Check options before anything is imported that takes seconds.

    Raises:
        ValueError: options are out of range or contradict each other.
        OSError: the output cannot be written.
    """
    for name, least in LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least {least}")
    if options.output:
        check_writable(options.output)
    check_processes(options)
    if options.clock == "processor" and options.threads != 1:
        raise ValueError(
            "--clock processor counts the time of all threads together: add --threads 1"
        )
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if (ranks > 1) != (options.what == ["parallel"]):
        raise ValueError(
            f"--what {' '.join(options.what)} on {ranks} process(es): 'parallel' needs several "
            "(torchrun), by itself, and every other benchmark needs one"
        )


def check_processes(options: argparse.Namespace) -> None:
    """Check and complete the options of benchmarks in processes of their own.

    Raises:
        ValueError: a folder is not what it should be, or options contradict each other.
    """
    for name, file in (("against", "tools/benchmark.py"), ("te_path", "transformer_engine")):
        folder = getattr(options, name)
        if folder is None:
            continue
        if not (folder / file).exists():
            raise ValueError(f"--{name.replace('_', '-')} {folder}: no {file} is there")
        setattr(options, name, folder.resolve())
    if not (options.quick or options.against):
        return
    if options.vary:
        raise ValueError("--vary compares settings in one process; leave --against or --quick out")
    if options.against and not options.quick and set(options.what) & {"all", "parallel"}:
        raise ValueError("--against: name benchmarks of one process, such as --what step memory")
    if options.quick:
        options.rounds, options.profiles = options.rounds or 10, 0
    options.seconds = options.seconds or (240.0 if options.quick else None)


def build_harness(options: argparse.Namespace, device: torch.device) -> Harness:
    """Build the harness from the options, with defaults for the device."""
    from benchmarks.suite import Harness

    on_gpu = device.type == "cuda"
    scale = SCALES[options.scale or ("paper" if on_gpu else "cpu")]
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    return Harness(
        presets=options.presets,
        scale=dataclasses.replace(scale, **given),
        device=device,
        rounds=options.rounds or (50 if on_gpu else 10),
        warmup=options.warmup,
        clock=options.clock,
        profiles=options.profiles,
        steps=options.steps,
        setting_variants=options.vary,
        changes=tuple(options.overrides),
    )


def setting_variants_of(varied: list[str]) -> tuple[tuple[str, ...], ...]:
    """Return every combination of the given values, as overrides of settings.

    Raises:
        ValueError: one does not have the form section.key=A,B.
    """
    choices = []
    for text in varied:
        key, equals, values = text.partition("=")
        if not equals or "." not in key:
            raise ValueError(f"--vary {text!r}: must have the form section.key=A,B")
        choices.append([f"{key}={BOOLEANS.get(value, value)}" for value in values.split(",")])
    return tuple(product(*choices)) if choices else ()
