"""Start a CoE model from a pretrained MoE, to be trained further.

    coe upcycle --input deepseek-v2-lite --iterations 2 --output runs/mine/checkpoints
    coe upcycle --input runs/moe/checkpoints --output runs/coe/checkpoints

Exit status: 0 done, 2 an error of the user or a damaged input (one line on stderr, no output).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_coe.cli.command_line import (
    add_renamed,
    add_tokenizer_argument,
    new_parser,
    run,
)
from megatron_coe.utils.imports import collected_later, quiet_megatron


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: command(parse(arguments, prog)))


def command(options: argparse.Namespace) -> None:
    quiet_megatron()
    with collected_later():  # imports Megatron, which takes seconds
        from megatron_coe.conversion.malloc import release_freed_memory
        from megatron_coe.conversion.upcycle import upcycle

    release_freed_memory()
    step = upcycle(options.input, options.output, options.iterations, options.tokenizer)
    print(f"{options.input} -> {step}; train it with --config {step / 'config.yaml'}")


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    add_renamed(
        parser,
        "--input",
        "--load",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="Hugging Face folder, or training checkpoint, of a model with one iteration",
    )
    add_tokenizer_argument(parser)
    parser.add_argument(
        "--iterations", type=int, default=2, metavar="C", help="of the CoE model (default: 2)"
    )
    add_renamed(parser, "--output", "--save", type=Path, required=True, metavar="NEW_FOLDER")
    return parser.parse_args(arguments)
