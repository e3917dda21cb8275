"""Convert a checkpoint to a Hugging Face folder, or a folder to a checkpoint; place its experts.

    coe convert to-hf --input runs/quickstart/checkpoints --output my-model
    coe convert to-hf --input my-moe/checkpoints --output moe --as deepseek_v2
    coe convert from-hf --input my-model --output runs/mine/checkpoints
    coe convert place --input my-model --placement my-analysis/placement.json --ep 8 \\
        --output runs/placed/checkpoints

Exit status: 0 done, 2 an error of the user or a damaged input (one line on stderr, no output).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_coe.cli.command_line import (
    add_renamed,
    add_tokenizer_argument,
    new_parser,
    run,
)
from megatron_coe.utils.imports import collected_later, quiet_megatron

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: command(parse(arguments, prog)))


def command(options: argparse.Namespace) -> None:
    quiet_megatron()
    with collected_later():  # imports Megatron, which takes seconds
        from megatron_coe.conversion.export_hf import DTYPES, to_hf
        from megatron_coe.conversion.import_hf import from_hf
        from megatron_coe.conversion.malloc import release_freed_memory
        from megatron_coe.conversion.place import place

    release_freed_memory()
    if options.direction == "to-hf":
        dtype = DTYPES[options.dtype] if options.dtype else None
        source = to_hf(
            options.input,
            options.output,
            dtype,
            options.max_shard_size,
            options.family,
            options.tokenizer,
            options.ema,
            options.mtp,
        )
        print(f"{source} -> {options.output}")
        return
    if options.direction == "place":
        paths = (options.input, options.output, options.placement)
        step = place(*paths, options.ep, options.tokenizer)
    else:
        step = from_hf(options.input, options.output, options.mtp)
    print(f"{options.input} -> {step}; train it with --config {step / 'config.yaml'}")


def parse(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog)
    directions = parser.add_subparsers(dest="direction", required=True)
    to_hf = directions.add_parser("to-hf", help="training checkpoint -> Hugging Face folder")
    from_hf = directions.add_parser("from-hf", help="Hugging Face folder -> training checkpoint")
    placing = directions.add_parser(
        "place", help="checkpoint or Hugging Face folder -> checkpoint, experts in another order"
    )
    for direction in (to_hf, from_hf, placing):
        add_renamed(direction, "--input", "--load", type=Path, required=True, metavar="FOLDER")
        add_renamed(direction, "--output", "--save", type=Path, required=True, metavar="NEW_FOLDER")
    placing.add_argument(
        "--placement",
        type=Path,
        required=True,
        metavar="FILE",
        help="placement.json of `coe analyze --placement`",
    )
    placing.add_argument("--ep", type=int, required=True, help="expert-parallel size to place for")
    add_tokenizer_argument(placing)
    for direction in (to_hf, from_hf):
        direction.add_argument(
            "--without-mtp",
            dest="mtp",
            action="store_false",
            help="leave out the layers of multi-token prediction (mtp_num_layers)",
        )
    add_tokenizer_argument(to_hf)
    to_hf.add_argument(
        "--ema", action="store_true", help="the moving average of the weights (train.ema_decay)"
    )
    to_hf.add_argument("--dtype", choices=("bf16", "fp32"), help="default: as in the checkpoint")
    to_hf.add_argument(
        "--max-shard-size",
        type=size,
        default="5GB",
        metavar="SIZE",
        help="largest file of weights, such as 500MB (default: 5GB)",
    )
    to_hf.add_argument(
        "--as",
        dest="family",
        choices=("coe_deepseekv2", "deepseek_v2"),
        default="coe_deepseekv2",
        help="deepseek_v2: for transformers' own class; only one iteration with residual outer",
    )
    return parser.parse_args(arguments)


def size(text: str) -> int:
    """Return bytes of a size such as 500MB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if not match or match[2] not in UNITS or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write, for example, 500MB or 5GB")
    return int(float(match[1]) * UNITS[match[2]])
