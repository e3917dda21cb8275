"""Train a SentencePiece tokenizer.

    coe train-tokenizer --input train.jsonl --qa-keys query response \\
        --vocab-size 4096 --output tokenizer.model
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_coe.cli.command_line import (
    add_text_arguments,
    fields_of,
    new_parser,
    required,
    run,
)

with required():
    from megatron_coe.data.tokenizer import train_tokenizer


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: command(parse(arguments, prog)))


def command(options: argparse.Namespace) -> None:
    tokenizer = train_tokenizer(
        options.input,
        options.output,
        fields=fields_of(options),
        vocab_size=options.vocab_size,
        model_type=options.model_type,
    )
    print(f"{options.output} ({tokenizer.vocab_size} pieces)")


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    add_text_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="model file to write")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces (default 4096)")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe")
    return parser.parse_args(arguments)
