"""Generates a math corpus: OUTPUT_DIR/train.jsonl and valid.jsonl with keys query and response.

python tools/make_corpus.py --output-dir runs/quickstart/data
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from megatron_coe.cli.command_line import run
from megatron_coe.data.corpus import make_corpus


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--train-size", type=int, default=20_000, help="examples (default 20000)")
    parser.add_argument("--valid-size", type=int, default=500, help="examples (default 500)")
    parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args()
    for path in make_corpus(
        options.output_dir,
        train_size=options.train_size,
        valid_size=options.valid_size,
        seed=options.seed,
    ):
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    sys.exit(run(main))
