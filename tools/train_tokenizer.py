"""Trains a SentencePiece tokenizer.

    python tools/train_tokenizer.py --input train.jsonl --qa-keys query response \\
        --vocab-size 4096 --output tokenizer.model
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from megatron_coe.cli.command_line import add_text_arguments, fields_of, required, run

with required():
    from megatron_coe.data.tokenizer import train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_text_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="model file to write")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces (default 4096)")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe")
    options = parser.parse_args()
    tokenizer = train_tokenizer(
        options.input,
        options.output,
        fields=fields_of(options),
        vocab_size=options.vocab_size,
        model_type=options.model_type,
    )
    print(f"{options.output} ({tokenizer.vocab_size} pieces)")


if __name__ == "__main__":
    sys.exit(run(main))
