"""Tokenize text files into Megatron's .bin/.idx, the same bytes for any number of workers.

    coe preprocess --input train.jsonl --qa-keys query response \\
        --tokenizer tokenizer.model --output-prefix data/train --workers 2
    coe preprocess --input chats.jsonl --messages-key messages \\
        --tokenizer my-model --output-prefix data/chats
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_coe.cli.command_line import (
    add_chat_arguments,
    add_renamed,
    add_text_arguments,
    fields_of,
    new_parser,
    required,
    run,
)

with required():
    from megatron_coe.data.preprocess import preprocess


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: command(parse(arguments, prog)))


def command(options: argparse.Namespace) -> None:
    summary = preprocess(
        options.input,
        options.output_prefix,
        options.tokenizer,
        fields=fields_of(options),
        workers=options.workers,
        append_eod=options.append_eod,
        prepend_bos=options.prepend_bos,
        split_sentences=options.split_sentences,
        skip_bad_lines=options.skip_bad_lines,
    )
    for prefix, tokens in summary.tokens.items():
        print(f"{prefix}.bin/.idx: {summary.documents[prefix]:,} documents, {tokens:,} tokens")
    if summary.answers is not None:
        print(f"{summary.answers:,} tokens are answers, the targets of the loss")
    if summary.splitter:
        print(f"sentences split by {summary.splitter}")
    if summary.empty:
        print(f"{summary.empty:,} empty texts left out")
    if summary.bad_lines:
        print(f"{summary.bad_lines:,} broken records skipped")


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    add_text_arguments(parser)
    add_chat_arguments(parser)
    add_renamed(  # Megatron's name first
        parser,
        "--output-prefix",
        "--output",
        type=Path,
        required=True,
        help="--json-keys writes PREFIX_KEY_document.bin/.idx, all others PREFIX.bin/.idx",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="SentencePiece .model file, or folder of a Hugging Face tokenizer",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument(
        "--append-eod", action="store_true", help="end each document with the tokenizer's token"
    )
    parser.add_argument(
        "--prepend-bos", action="store_true", help="begin each document with the tokenizer's token"
    )
    parser.add_argument(
        "--split-sentences", action="store_true", help="each sentence a sequence of its own (NLTK)"
    )
    parser.add_argument(
        "--skip-bad-lines", action="store_true", help="count broken records instead of stopping"
    )
    return parser.parse_args(arguments)
