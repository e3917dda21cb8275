"""Turn a pretrained mixture of experts into a chain of experts, to be trained on.

    python tools/upcycle.py --load deepseek-v2-lite --iterations 2 --save runs/mine/checkpoints
    python tools/upcycle.py --load runs/moe/checkpoints --save runs/coe/checkpoints

Exit status: 0 done, 2 a mistake or a damaged input (said in one line; nothing is left behind).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from megatron_coe.cli.command_line import add_tokenizer_argument, run


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    # Megatron says so in every module; for a conversion it does not matter.
    warnings.filterwarnings("ignore", module="megatron.*")
    from megatron_coe.conversion.memory import give_back_what_is_freed
    from megatron_coe.conversion.upcycle import upcycle  # imports Megatron, which takes seconds

    give_back_what_is_freed()
    step = upcycle(options.load, options.save, options.iterations, options.tokenizer)
    print(f"{options.load} -> {step}; train it with --config {step / 'config.yaml'}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="Hugging Face folder, or training checkpoint, of a model with one iteration",
    )
    add_tokenizer_argument(parser)
    parser.add_argument(
        "--iterations", type=int, default=2, metavar="C", help="of the chain (default: 2)"
    )
    parser.add_argument("--save", type=Path, required=True, metavar="NEW_FOLDER")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run(main))
