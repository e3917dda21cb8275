"""Comparison of models by validation loss, over several seeds on the same data.

All models of a seed are trained before the next seed, so that a disturbance of the machine affects
all alike, and differences are paired by seed: both models of a pair saw the same sequences in the
same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_coe.analysis.intervals import spread
from megatron_coe.analysis.run_jobs import Run, last_validation_loss, train
from megatron_coe.config.loader import load_settings
from megatron_coe.config.validation import check_files_named, check_values
from megatron_coe.utils.tables import markdown_table


def compare(
    configs: Sequence[Path],
    seeds: Sequence[int],
    directory: Path,
    overrides: Sequence[str],
    jobs: int = 1,
    threads: int = 1,
) -> dict[str, list[float]]:
    """Train every model with every seed and return its last validation losses, by model and seed.

    A run that `directory` holds already is skipped if complete, and resumed otherwise.

    Args:
        configs: settings files; a model is named after its file.
        seeds: of the runs, each once, 0 or more.
        directory: holds a folder for each run.
        overrides: `section.key=value` settings for all runs.
        jobs: runs at a time.
        threads: CPU threads of each run.

    Returns:
        Model name -> last validation losses (nats per token), in the order of `seeds`.

    Raises:
        ValueError: two files have the same name, a seed stands twice, a setting is invalid, or a
            run failed or did not validate.
        OSError: a file cannot be read.
    """
    names = [config.stem for config in configs]
    if len(set(names)) < len(names):
        raise ValueError(f"two of the files go by the same name: {', '.join(names)}")
    check_seeds(seeds)
    runs = []
    for seed in seeds:
        for config in configs:
            name = run_name(config.stem, seed)
            own = [f"train.seed={seed}", f"log.dir={directory / name}"]
            settings = load_settings(config, [*overrides, *own])
            check_values(settings)
            check_files_named(settings, held_out=True)
            runs.append(Run(name, settings))
    train(runs, jobs, threads)
    return {
        name: [last_validation_loss(directory / run_name(name, seed)) for seed in seeds]
        for name in names
    }


def check_seeds(seeds: Sequence[int]) -> None:
    """Check that every seed stands once and is 0 or more.

    Raises:
        ValueError: one is not.
    """
    if len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
        raise ValueError(f"seeds={list(seeds)}: give each number once, 0 or more")


def run_name(model: str, seed: int) -> str:
    """Return the name of a model's run with a seed: that of its folder."""
    return f"{model}_seed-{seed}"


def as_table(losses: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> str:
    """Return a Markdown table of each seed's loss, their mean, and the paired difference.

    The difference is to the first model, seed by seed, as mean and standard deviation.
    """
    baseline = next(iter(losses.values()))
    head = ["model", *(f"seed {seed}" for seed in seeds), "mean ± std", "difference ± std"]
    rows = []
    for name, values in losses.items():
        differences = [mine - base for mine, base in zip(values, baseline, strict=True)]
        relative = "" if values is baseline else spread(differences, "+.4f")
        rows.append([name, *(f"{value:.4f}" for value in values), spread(values), relative])
    return markdown_table(head, rows)
