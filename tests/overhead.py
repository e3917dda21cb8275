"""What reporting costs: the parts of a step that only a reported one has, against the whole step.

    python tests/overhead.py [--scale cpu] [--rounds 10]

One process and one thread, by its own processor time, so that others on the machine disturb little.
The parts are all there is: counting in the routers, norms of gradients, reading the figures, and
metrics.jsonl and TensorBoard. (Whole steps with and without differ by less than they vary.)
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
PRESET = REPO / "examples" / "paper" / "coe-2_4-64.yaml"


class Stopwatches:
    """Processor seconds spent in methods of single objects, by a name for each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, name: str, owner: object, method: str) -> None:
        original = getattr(owner, method)

        def timed(*arguments: object, **named: object) -> object:
            started_s = time.process_time()
            try:
                return original(*arguments, **named)
            finally:
                self.seconds[name] += time.process_time() - started_s

        setattr(owner, method, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", default="cpu", help="of tools/benchmark.py")
    parser.add_argument("--rounds", type=int, default=10, help="steps")
    options = parser.parse_args()
    import torch  # only now: takes seconds

    from benchmarks.scale import SCALES, preset_settings
    from benchmarks.steps import build_step
    from megatron_coe.config.run_config import LogSettings
    from megatron_coe.distributed.process_groups import process_groups
    from megatron_coe.model import backends
    from megatron_coe.model.moe.router import CoERouter
    from megatron_coe.training.metrics_logger import MetricsLogger

    torch.set_num_threads(1)
    device = backends.prepare()
    settings = preset_settings(PRESET, SCALES[options.scale], "log.interval=1")
    watches, shares = Stopwatches(), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, process_groups(settings.parallel, device):
        trainer = build_step("CoE-2(4/64)", settings, device).trainer
        metrics_logger = MetricsLogger(LogSettings(dir=folder), 1, 0, {}, sys.stderr)
        for module in trainer.train_state.chunks[0].modules():
            if isinstance(module, CoERouter):
                watches.watch("counting", module, "count")
        watches.watch("norms of gradients", trainer.train_step.gradient_norms, "measure")
        watches.watch("reading", trainer, "metrics")
        watches.watch("writing", metrics_logger, "record")
        for number in range(1 + options.rounds):
            watches.seconds.clear()
            started_s = time.process_time()
            metrics_logger.record(trainer.progress.step, trainer.metrics(trainer.step()))
            seconds = time.process_time() - started_s
            if number:  # the first one is for warming up
                shares["all"].append(sum(watches.seconds.values()) / seconds)
                for name, part_s in watches.seconds.items():
                    shares[name].append(part_s / seconds)
        metrics_logger.close()
    print(f"{options.scale}: {options.rounds} steps, the last of {seconds:.2f} s; share of a step:")
    for name, values in shares.items():
        print(f"{name:20} {statistics.median(values):.3%} ({min(values):.3%} … {max(values):.3%})")


if __name__ == "__main__":
    main()
