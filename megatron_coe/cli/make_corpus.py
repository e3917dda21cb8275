"""Generate a math corpus: OUTPUT/train.jsonl and valid.jsonl with keys query and response.

coe make-corpus --output runs/quickstart/data
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_coe.cli.command_line import add_renamed, new_parser, run
from megatron_coe.data.corpus import make_corpus


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: command(parse(arguments, prog)))


def command(options: argparse.Namespace) -> None:
    for path in make_corpus(
        options.output,
        train_size=options.train_size,
        valid_size=options.valid_size,
        seed=options.seed,
        messages=options.messages,
    ):
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    add_renamed(parser, "--output", "--output-dir", type=Path, required=True)
    parser.add_argument("--train-size", type=int, default=20_000, help="examples (default 20000)")
    parser.add_argument("--valid-size", type=int, default=500, help="examples (default 500)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument(
        "--messages", action="store_true", help="conversations, under the key messages, instead"
    )
    return parser.parse_args(arguments)
