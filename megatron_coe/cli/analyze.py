"""Measure what the routers of a model choose on held-out text, from iteration to iteration.

    coe analyze --model runs/quickstart --input runs/quickstart/data/valid \\
        --random-init --output runs/quickstart/analysis
    coe analyze --model my-model --input valid.jsonl --qa-keys query response \\
        --output my-analysis

--model is a Hugging Face folder, a training checkpoint, or a run's folder (or its folder of
checkpoints): then every checkpoint in it, over time. --input is the prefix of a .bin/.idx pair that
the model's tokenizer made, or a file of text. Into --output go tables (CSV), pictures (PNG) and
summary.json; docs/analysis.md defines each figure.

Exit status: 0 done, 2 an error of the user (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_coe.cli.command_line import (
    add_key_arguments,
    add_model_argument,
    add_renamed,
    add_tokenizer_argument,
    fields_of,
    new_parser,
    run,
)
from megatron_coe.utils.files import check_writable
from megatron_coe.utils.imports import quiet_megatron


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: command(parse(arguments, prog)), interrupted="interrupted")


def command(options: argparse.Namespace) -> None:
    quiet_megatron()
    from transformers.utils import logging

    from megatron_coe import generation  # imports torch and transformers: seconds
    from megatron_coe.analysis import placement
    from megatron_coe.analysis.analyze import analyze, as_table
    from megatron_coe.analysis.heldout import Source
    from megatron_coe.analysis.plotting import new_figure
    from megatron_coe.analysis.results import SUMMARY
    from megatron_coe.analysis.routing_tables import PermutationTest

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Is there a matplotlib, and a folder to write to? Not to be asked after an hour.
    new_figure(1, 1)
    check_writable(options.output / SUMMARY)
    if options.placement:
        placement.check_solver()
    source = Source(
        tuple(options.input), fields_of(options), options.tokens, options.seq_length, options.mode
    )
    analysis = analyze(
        options.model,
        source,
        PermutationTest(options.permutations, options.seed),
        device=generation.choose_device(options.device),
        control=options.random_init,
        placed=options.placement,
        batch_size=options.batch_size,
        tokenizer=options.tokenizer,
    )
    analysis.write(options.output)
    if analysis.placements:
        print(f"\n{placement.as_table(analysis.placements)}")
    print(f"\n{as_table(analysis)}\n\nTables, pictures and summary.json are in {options.output}")


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    add_model_argument(parser)
    add_tokenizer_argument(parser)
    add_renamed(
        parser,
        "--input",
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="PREFIX|FILE",
        help="held-out text",
    )
    add_key_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--random-init",
        action="store_true",
        help="also measure a model of this shape with initial weights: the control",
    )
    parser.add_argument(
        "--placement",
        action="store_true",
        help="also place the experts on expert-parallel ranks (needs scipy)",
    )
    parser.add_argument(
        "--tokens", type=int, default=16384, help="how much text is read (default: %(default)s)"
    )
    parser.add_argument(
        "--seq-length", type=int, metavar="S", help="default: 512, or the model's if it has fewer"
    )
    parser.add_argument(
        "--mode",
        choices=("packed", "padded", "examples"),  # the last is the former name of padded
        metavar="packed|padded",
        help="how sequences are cut; default: as trained",
    )
    parser.add_argument(
        "--permutations",
        type=int,
        default=199,
        metavar="N",
        help="shuffles per null hypothesis; p is at least 1 / (N + 1) (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of shuffles and initial weights")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    return parser.parse_args(arguments)
