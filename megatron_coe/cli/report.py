"""Write one page about a run: an HTML file that opens anywhere, without a network.

    coe report runs/quickstart
    coe report runs/quickstart --output quickstart.html --no-analysis

It shows losses and other curves, routing maps, the settings, samples (answers.txt) and the last
figures. Routing comes from RUN/analysis, where coe analyze has left it; without that
the run's checkpoints are analyzed on its held-out data, into that folder.

Exit status: 0 done, 2 an error of the user (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_coe.cli.command_line import new_parser, required, run
from megatron_coe.utils.files import check_writable
from megatron_coe.utils.imports import missing_package, quiet_megatron

with required():
    from megatron_coe.analysis.runs import Run
    from megatron_coe.config.run_config import held_out_sets

if TYPE_CHECKING:
    from megatron_coe.analysis.results import Analysis

ANALYSIS = "analysis"


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: command(parse(arguments, prog)), interrupted="interrupted")


def command(options: argparse.Namespace) -> None:
    the_run = Run.read(options.run)
    folder = the_run.metrics.parent
    output = options.output or folder / "report.html"
    if output.suffix.lower() not in (".html", ".htm"):
        output = output.with_name(f"{output.name}.html")
    check_writable(output)
    from megatron_coe.analysis.report import write_report  # imports torch: seconds
    from megatron_coe.analysis.results import SUMMARY, Analysis

    found = None
    if (folder / ANALYSIS / SUMMARY).is_file():
        found = Analysis.read(folder / ANALYSIS)
    elif options.analysis and can_be_analyzed(the_run):
        found = analyze(the_run, folder / ANALYSIS)
    write_report(the_run, output, found)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def can_be_analyzed(the_run: Run) -> bool:
    """Return whether there are checkpoints beside the metrics, and held-out data where it was."""
    from megatron_coe.checkpoint.directory import find_checkpoints

    data = held_out(the_run)
    there = bool(data) and all(Path(f"{prefix}.idx").is_file() for prefix in data)
    return there and bool(find_checkpoints(the_run.metrics.parent / "checkpoints"))


def held_out(the_run: Run) -> list[Path]:
    """Return the prefixes of the run's held-out sets, one after the other."""
    sets = held_out_sets(the_run.settings.data)
    return [Path(prefix) for prefixes in sets.values() for prefix in prefixes]


def analyze(the_run: Run, output: Path) -> Analysis:
    quiet_megatron()
    try:
        from transformers.utils import logging

        from megatron_coe import generation
        from megatron_coe.analysis.analyze import analyze
        from megatron_coe.analysis.heldout import Source
        from megatron_coe.analysis.routing_tables import PermutationTest
    except ModuleNotFoundError as error:
        if (reported := missing_package(error)) is None:
            raise
        raise ValueError(f"{reported}; or give --no-analysis") from error
    from megatron_coe.data.records import Fields

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = Source(tuple(held_out(the_run)), Fields())
    device = generation.choose_device("auto")
    found = analyze(the_run.metrics.parent, source, PermutationTest(), device=device, control=True)
    found.write(output)
    return found


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="its .html may be left out; default: RUN/report.html",
    )
    parser.add_argument(
        "--no-analysis", dest="analysis", action="store_false", help="do not analyze checkpoints"
    )
    return parser.parse_args(arguments)
