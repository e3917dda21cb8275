"""What verified saving costs: whole saves of a real state, with and without the manifest.

    python -m tests.faults.save_overhead --folder /some/disk --saves 9

Both variants alternate in one process, each order as often as the other, on the same state (weights
and both moments of a model, fp32). Reported are medians, and the median of the ratios of pairs;
with `--background` of what training waits for when checkpoints are written asynchronously.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from megatron_coe.checkpoint.state import state_size
from megatron_coe.distributed.process_groups import process_groups
from megatron_coe.model import backends
from tests.unit.training.runs import make_settings, make_trainer

MODEL = {"num_layers": 4, "hidden_size": 512, "num_moe_experts": 16, "moe_ffn_hidden_size": 768}
LIMIT = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to save; the disk that is measured")
    parser.add_argument("--saves", type=int, default=9, help="per variant")
    parser.add_argument("--background", action="store_true", help="time what training waits for")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        times = measure(Path(folder), options.saves, options.background)
    off, on = times[False], times[True]
    ratio = statistics.median(b / a for a, b in zip(off, on, strict=True)) - 1
    for name, times_s in (("without", off), ("with", on)):
        print(f"{name:8} manifest: median {statistics.median(times_s):.2f} s, {_spread(times_s)}")
    print(f"overhead: {ratio:+.1%} (median of pairs), {_change(off, on):+.1%} (of the medians)")
    return 0 if min(ratio, _change(off, on)) <= LIMIT else 1


def measure(folder: Path, saves: int, background: bool = False) -> dict[bool, list[float]]:
    """Return the seconds of each save (or of its start), by whether it was verified."""
    device = backends.prepare()
    settings = make_settings(
        folder, model=MODEL, checkpoint={"keep_latest": 1, "async_save": background}
    )
    times: dict[bool, list[float]] = {False: [], True: []}
    with process_groups(settings.parallel, device):
        trainer = make_trainer(settings, device)
        print(f"a state of {state_size(trainer.train_state) / 1e9:.2f} GB in {folder}")
        for number in range(-1, saves):  # the first pair warms up
            for verify in (False, True) if number % 2 else (True, False):
                shutil.rmtree(folder)  # deleting the checkpoint before is not part of a save
                settings.checkpoint.verify = verify
                start = time.perf_counter()
                trainer.save()
                if number >= 0:
                    times[verify].append(time.perf_counter() - start)
                trainer.checkpointer.finish()
    return times


def _change(off: list[float], on: list[float]) -> float:
    return statistics.median(on) / statistics.median(off) - 1


def _spread(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"middle half {low:.2f} to {high:.2f} s, all {min(values):.2f} to {max(values):.2f} s"


if __name__ == "__main__":
    sys.exit(main())
