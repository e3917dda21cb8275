"""Processor time of a run until its first step, of this checkout and of another.

    python -m benchmarks.start_up --against ../baseline --rounds 5

The processes alternate. What `import torch, megatron.core` takes by itself is taken off: a run
cannot do without.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

REPO = Path(__file__).parents[1]
MADE = REPO / "tests" / "data" / "777423a"
IMPORTS = "import time, torch, megatron.core; open('ready', 'w').close(); time.sleep(60)"
DATA = ("data.train=[train]", "data.valid=[valid]", "data.tokenizer=tokenizer.model")
TINY = (
    *("config.yaml", "train.stop_step=null"),
    *("model.attention_dropout=0.0", "parallel.expert_model_parallel_size=1"),
)
RUNS = {
    "a tiny run": TINY,
    "of 10 million documents": (*TINY, "data.train=[many]"),
    "of the paper's width, two layers": (
        *("{checkout}/examples/paper/coe-2_4-64.yaml", *DATA, "model.num_layers=2"),
        *("train.global_batch_size=8", "train.micro_batch_size=1"),
    ),
}
"""Settings that every version reads."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, required=True, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    checkouts = {"this": REPO, "other": options.against.resolve()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(MADE, folder, dirs_exist_ok=True)
        write_documents(folder / "many", 10_000_000)
        imports: list[float] = []
        found: dict[str, dict[str, list[float]]] = {run: {n: [] for n in checkouts} for run in RUNS}
        for number in range(-1, options.rounds):  # the first compiles and fills caches of the disk
            order = list(checkouts.items())[:: 1 if number % 2 else -1]
            seconds = processor_time(folder, REPO, ["-c", IMPORTS], folder / "ready")
            imports += [seconds] * (number >= 0)
            for run, (config, *settings) in RUNS.items():
                for name, checkout in order:
                    path = config.format(checkout=checkout)
                    arguments = [str(checkout / "pretrain_coe.py"), "--config", path, *settings]
                    arguments += ["log.dir=new", "checkpoint.save=new/checkpoints"]
                    ready = folder / "new" / "config.yaml"  # written last before the first step
                    seconds = processor_time(folder, checkout, arguments, ready)
                    found[run][name] += [seconds] * (number >= 0)
    alone = statistics.median(imports)
    print(f"imports alone {alone:.2f} s of processor time; beyond them, until the first step:")
    for run in RUNS:
        ours, theirs = (statistics.median(found[run][name]) - alone for name in checkouts)
        print(f"{run}: {ours:.2f} s, the other {theirs:.2f} s, {ours / theirs:.2f} of it")


def processor_time(folder: Path, checkout: Path, arguments: list[str], ready: Path) -> float:
    """Return the seconds that a process has taken when it writes a file; it is ended then."""
    shutil.rmtree(folder / "new", ignore_errors=True)
    ready.unlink(missing_ok=True)
    environment = {"PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        watched = psutil.Process(process.pid)
        while not ready.exists():
            if process.poll() is not None:
                raise RuntimeError(f"ended before its first step: {' '.join(arguments)}")
            time.sleep(0.005)
        times = watched.cpu_times()
        return times.user + times.system
    finally:
        process.kill()
        process.wait()


def write_documents(prefix: Path, number: int) -> None:
    """Write token files of so many documents of 4 to 12 tokens, all with the ids of `MADE`."""
    random = np.random.default_rng(1)
    lengths = random.integers(4, 13, number).astype(np.int32)
    tokens = random.integers(4, 290, int(lengths.sum())).astype(np.uint16)
    tokens.tofile(prefix.with_suffix(".bin"))
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, number, number + 1))
        for part in (lengths, 2 * starts, np.arange(number + 1)):
            file.write(part.tobytes())


if __name__ == "__main__":
    main()
