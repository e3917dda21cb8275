"""Ask models held-out questions, and count the answers whose final part is the true one.

    coe score --model my-model --input valid.jsonl
    coe score --model base tuned --input chats.jsonl --samples 200 --show 1

A line of --input holds `messages`, the last of which is the answer, or `query` and `response`. The
likeliest tokens are taken; of an answer counts what follows its last ####, or all of it. --model
takes Hugging Face folders, training checkpoints, and folders of checkpoints (then the newest).

Exit status: 0 done, 2 an error of the user (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_coe.cli.command_line import new_parser, run
from megatron_coe.utils.imports import quiet_megatron


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: command(parse(arguments, prog)), interrupted="interrupted")


def command(options: argparse.Namespace) -> None:
    from megatron_coe.data.questions import read_questions  # imports tokenizers

    questions = read_questions(options.input, options.samples)
    quiet_megatron()
    from transformers.utils import logging

    from megatron_coe.analysis.exact_match import exact_match  # imports torch and transformers
    from megatron_coe.generation import choose_device

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = choose_device(options.device)
    for folder in options.model:
        score = exact_match(folder, questions, options.max_new_tokens, device)
        count = len(score.replies)
        if options.json:
            print(json.dumps({"exact_match": score.exact_match, "right": score.right, "of": count}))
            continue
        print(f"{folder}: {score.right} of {count} right, exact match {score.exact_match:.3f}")
        for question, reply in list(zip(questions, score.replies, strict=True))[: options.show]:
            asked = question.prompt
            asked = asked if isinstance(asked, str) else asked[-1]["content"]
            print(f"  question: {asked}\n  answer:   {reply}\n  true:     {question.answer}")


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    parser.add_argument("--model", type=Path, nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--samples", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print the first N replies"
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON per model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    return parser.parse_args(arguments)
