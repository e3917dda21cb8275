"""Several models, several seeds each, on the same data: does one reach a lower validation loss?

Seeds are taken in turn over the models, so that a disturbance of the machine meets all alike, and
differences are paired by seed: both models of a pair saw the same sequences in the same order.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_coe.training.checks import check_files_named, check_values
from megatron_coe.training.metrics import METRICS_FILE, read_records
from megatron_coe.training.settings import load_settings

ENTRY_POINT = Path(__file__).resolve().parents[2] / "pretrain_coe.py"


def compare(
    configs: Sequence[Path], seeds: Sequence[int], directory: Path, overrides: Sequence[str]
) -> dict[str, list[float]]:
    """Train every model with every seed and return its last validation losses, by model and seed.

    A run that `directory` holds already is not made again, and one cut short is continued.

    Args:
        configs: settings files; a model goes by the name of its file.
        overrides: `section.key=value` settings for all runs.

    Raises:
        ValueError: two files have the same name, a seed stands twice, there is a mistake in the
            settings, or a run failed or did not validate.
        OSError: a file cannot be read.
    """
    names = [config.stem for config in configs]
    if len(set(names)) < len(names):
        raise ValueError(f"two of the files go by the same name: {', '.join(names)}")
    if len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
        raise ValueError(f"seeds={list(seeds)}: give each number once, 0 or more")
    for config in configs:  # a mistake in the last file must not show after hours of the first
        settings = load_settings(config, overrides)
        check_values(settings)
        check_files_named(settings, held_out=True)
    losses: dict[str, list[float]] = {name: [] for name in names}
    for seed in seeds:
        for config in configs:
            run = directory / f"{config.stem}_seed-{seed}"
            command = [sys.executable, str(ENTRY_POINT), "--config", str(config), *overrides]
            done = subprocess.run([*command, f"train.seed={seed}", f"log.dir={run}"], check=False)
            if done.returncode != 0:
                raise ValueError(f"{run}: the run ended with status {done.returncode}, see above")
            losses[config.stem].append(last_validation_loss(run / METRICS_FILE))
    return losses


def last_validation_loss(metrics: Path) -> float:
    """The newest validation loss of a run, nats per token."""
    found = [record["valid_loss"] for record in read_records(metrics) if "valid_loss" in record]
    if not found:
        raise ValueError(f"{metrics}: holds no validation loss; set data.valid")
    return found[-1]


def as_table(losses: dict[str, list[float]], seeds: Sequence[int]) -> str:
    """A Markdown table: each seed's loss, mean and standard deviation, and the paired difference.

    The difference is to the first model, seed by seed: its mean and standard deviation.
    """
    baseline = next(iter(losses.values()))
    head = ["model", *(f"seed {seed}" for seed in seeds), "mean ± std", "difference ± std"]
    rows = []
    for name, values in losses.items():
        differences = [mine - base for mine, base in zip(values, baseline, strict=True)]
        relative = "" if values is baseline else spread(differences, "+.4f")
        rows.append([name, *(f"{value:.4f}" for value in values), spread(values), relative])
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean and standard deviation (of the sample; of a single value unknown)."""
    deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "?"
    return f"{statistics.mean(values):{form}} ± {deviation}"
