"""Continue prompts with a trained model; the text appears as it is made.

    coe generate --model my-model --prompt "The sum of 2 and 3 is"
    coe generate --model runs/mine/checkpoints --prompt "Once" --temperature 0.8 --seed 1
    coe generate --model my-model --input valid.jsonl --qa-keys query response

--model is a Hugging Face folder, a training checkpoint, or a folder of checkpoints (the newest is
taken). The likeliest token is chosen unless --temperature, --top-k or --top-p is given.

Exit status: 0 done, 2 an error of the user (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import islice

from megatron_coe.cli.command_line import (
    add_model_argument,
    add_text_arguments,
    add_tokenizer_argument,
    fields_of,
    new_parser,
    run,
)
from megatron_coe.data.records import check_inputs, question_prompt, read_values
from megatron_coe.utils.imports import collected_later, quiet_megatron


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: command(parse(arguments, prog)), interrupted="interrupted")


def command(options: argparse.Namespace) -> None:
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed={options.seed}: give a number from 0 to {2**32 - 1}")
    examples = read_examples(options)
    quiet_megatron()
    with collected_later():  # these import torch, transformers and Megatron: seconds
        from transformers import set_seed
        from transformers.utils import logging

        from megatron_coe import generation

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sampling = generation.Sampling(
        options.max_new_tokens, options.temperature, options.top_k, options.top_p
    )
    generator, prompts = generation.load(
        options.model,
        [prompt for prompt, _ in examples],
        dtype=generation.DTYPES.get(options.dtype),
        device=generation.choose_device(options.device),
        trust_remote_code=options.trust_remote_code,
        tokenizer=options.tokenizer,
    )
    if options.seed is not None:
        set_seed(options.seed)
    for number, (ids, (prompt, record)) in enumerate(zip(prompts, examples, strict=True)):
        write("\n" if number else "")
        write(f"question:  {record[0]}\ngenerated:" if options.qa_keys else prompt)
        generator.stream(ids, sampling, write)
        write(f"\ntrue:      {record[1]}\n" if options.qa_keys else "\n")


def read_examples(options: argparse.Namespace) -> list[tuple[str, tuple[str, ...]]]:
    """Read each prompt, and the record that it comes from."""
    if options.prompt:
        if options.json_keys or options.qa_keys or options.samples:
            raise ValueError("--json-keys, --qa-keys and --samples belong to --input")
        return [(prompt, (prompt,)) for prompt in options.prompt]
    fields = fields_of(options)
    if len(fields.keys) > 1 and not fields.question_answer:
        raise ValueError(f"json_keys={list(fields.keys)}: a prompt is under one key")
    check_inputs(options.input, fields)
    records = list(islice(read_values(options.input, fields), options.samples))
    if not records:
        raise ValueError(f"no prompt in {', '.join(map(str, options.input))}")
    as_prompt = question_prompt if fields.question_answer else str
    return [(as_prompt(record[0]), record) for record in records]


def write(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # the reader has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # 128 + SIGPIPE, as other programs end


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    add_model_argument(parser)
    add_tokenizer_argument(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be given again")
    add_text_arguments(parser, source)
    parser.add_argument(
        "--samples", type=positive, metavar="N", help="only the first N records of --input"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, help="divides the logits; 0: the likeliest")
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the likeliest K")
    parser.add_argument("--top-p", type=float, metavar="P", help="… with together probability P")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument(
        "--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="auto: as stored"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the folder brings along"
    )
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number >= 1")
    return int(text)
