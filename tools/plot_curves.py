"""Draw the training and validation loss of a run.

python tools/plot_curves.py runs/quickstart/metrics.jsonl --output runs/quickstart/loss.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_coe.analysis.curves import describe_end, plot_losses
from megatron_coe.data.command_line import run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", type=Path, help="metrics.jsonl of a run")
    parser.add_argument("--output", type=Path, required=True, help="picture (.png, .svg, .pdf)")
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    plot_losses(options.metrics, options.output, options.title)
    print(f"{options.output}: {describe_end(options.metrics)}")


if __name__ == "__main__":
    sys.exit(run(main))
