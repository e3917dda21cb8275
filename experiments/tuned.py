"""Training of an experiment whose variants each have their own learning rate.

The learning rate of a variant is the best of a grid, by the mean loss of tuning seeds on held-out
rows that the report does not use. The report's runs follow with seeds and rows of their own.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.data import Data, Source
from experiments.learning_rates import Grids, Losses, best_rate, next_rate, search
from experiments.measure import Sizes
from experiments.plans import Experiment, Variant
from experiments.report import Outcome
from experiments.run_results import ResultsFile, RunResult, settings_digest
from experiments.scales import Scale
from megatron_coe.analysis import run_jobs
from megatron_coe.analysis.runs import Run
from megatron_coe.utils.environment import commit
from megatron_coe.utils.metrics_file import read_records

FIRST_TUNING_SEED = 1001
"""Those of the report begin at 1."""
TUNING, REPORT = "tuning", "report"

VALIDATION = ("train.eval_samples=512", "train.eval_interval=100")
"""More sequences than in the other experiments, and less often: differences are small."""


@dataclass(frozen=True)
class TunedRun:
    """A run, and what tells it from the others."""

    variant: Variant
    lr: float
    seed: int
    held_out: str
    job: run_jobs.Run
    digest: str

    @property
    def key(self) -> tuple[str, float, int, str]:
        """As `RunResult.key`."""
        return self.variant.name, self.lr, self.seed, self.held_out

    def result(self) -> RunResult:
        """Read the result of the finished run."""
        records = read_records(self.job.metrics)
        losses = tuple((r["step"], round(r["valid_loss"], 6)) for r in records if "valid_loss" in r)
        seconds = round(max(record.get("seconds", 0.0) for record in records), 1)
        return RunResult(*self.key, losses, seconds, self.digest, commit())


@dataclass(frozen=True)
class Tuned:
    """An experiment at a scale, its runs' folder and the file that keeps their results.

    Attributes:
        experiment: whose variants are trained.
        scale: of the models.
        source: of the text.
        data: that text, tokenized.
        folder: of the runs.
        overrides: `section.key=value` settings of all runs.
        results: what is in it is not trained again.
    """

    experiment: Experiment
    scale: Scale
    source: Source
    data: Data
    folder: Path
    overrides: Sequence[str]
    results: ResultsFile

    def __post_init__(self) -> None:
        for override in self.overrides:
            if override.startswith("train.lr=") or override.startswith("train.min_lr="):
                raise ValueError(
                    f"{override}: {self.experiment.name} chooses the learning rate of each "
                    "variant; leave it out"
                )

    def run(self, variant: Variant, lr: float, seed: int, held_out: str = REPORT) -> TunedRun:
        """Return a variant's run."""
        rows = self.data.tuning if held_out == TUNING else self.data.report
        name = f"{self.scale.run_name(variant, seed)}_lr-{lr:g}"
        rates = [f"train.lr={lr:g}", f"train.min_lr={lr / 10:g}"]
        settings = self.scale.settings_of(
            variant,
            seed,
            self.folder / name,
            replace(self.data, valid=rows),
            [*VALIDATION, *self.overrides, *rates],
        )
        digest = settings_digest(settings, [held_out, self.source.described()])
        return TunedRun(variant, lr, seed, held_out, run_jobs.Run(name, settings), digest)

    def first_runs(self) -> list[TunedRun]:
        """Return a run of each variant, at the scale's learning rate: for sizes and checks."""
        return [self.run(v, self.scale_rate(v), 1) for v in self.experiment.variants]

    def scale_rate(self, variant: Variant) -> float:
        """Return the learning rate that a variant has in the other experiments."""
        data = replace(self.data, valid=self.data.report)
        return self.scale.settings_of(variant, 1, self.folder, data, self.overrides).train.lr

    def finished(self) -> dict[tuple[str, float, int, str], RunResult]:
        """Read the results so far."""
        return self.results.read()

    def train(self, runs: Iterable[TunedRun], jobs: int, threads: int) -> list[RunResult]:
        """Train the runs that have no result yet; each result is kept as its run ends.

        Returns: the results of all `runs`, in their order.

        Raises:
            ValueError: a run failed, or the file has a result of it with other settings.
            KeyboardInterrupt: as received, after the runs in progress have saved.
        """
        runs, finished = list(runs), self.finished()
        for run in runs:
            self.check(run, finished)
        waiting = {run.job.name: run for run in runs if run.key not in finished}

        def keep(job: run_jobs.Run) -> None:
            self.results.append(waiting[job.name].result())

        run_jobs.train([run.job for run in waiting.values()], jobs, threads, keep)
        finished = self.finished()
        return [finished[run.key] for run in runs]

    def tune(self, seeds: int, jobs: int, threads: int) -> Losses:
        """Find each variant's learning rate.

        Args:
            seeds: how many tuning seeds.

        Returns: the losses of each variant's grid.
        """
        variants = {variant.name: variant for variant in self.experiment.variants}

        def evaluate(grids: Grids) -> Losses:
            runs = [
                self.run(variants[name], lr, seed, TUNING)
                for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds)
                for name, grid in grids.items()
                for lr in grid
            ]
            return mean_losses(self.train(runs, jobs, threads))

        return search({v.name: self.scale_rate(v) for v in variants.values()}, evaluate)

    def report_runs(self, tuning: Losses, seeds: Sequence[int]) -> list[TunedRun]:
        """Return the report's runs, all variants of a seed before the next seed."""
        rates = rates_of(tuning, self.experiment, str(self.results.path))
        return [self.run(v, rates[v.name], s) for s in seeds for v in self.experiment.variants]

    def complete_seeds(self, tuning: Losses) -> list[int]:
        """Return the report's seeds that all variants have a result of.

        Raises:
            ValueError: there is none, or a variant's learning rate is not tuned.
        """
        rates = rates_of(tuning, self.experiment, str(self.results.path))
        of_variants = [
            {
                result.seed
                for result in self.finished().values()
                if (result.variant, result.lr, result.held_out) == (name, lr, REPORT)
            }
            for name, lr in rates.items()
        ]
        seeds = sorted(set.intersection(*of_variants))
        if not seeds:
            raise ValueError(f"{self.results.path}: no seed has a result of every variant")
        return seeds

    def outcome(self, tuning: Losses, seeds: Sequence[int], sizes: Mapping[str, Sizes]) -> Outcome:
        """Return the results of the report's seeds.

        Raises: ValueError: the file has a result with other settings.
        """
        finished = self.finished()
        runs: dict[str, list[Run]] = defaultdict(list)
        losses: dict[str, list[float]] = defaultdict(list)
        for run in self.report_runs(tuning, seeds):
            self.check(run, finished)
            result = finished[run.key]
            runs[run.variant.name].append(Run(run.job.metrics, result.records))
            losses[run.variant.name].append(result.loss)
        name = self.scale.name
        return Outcome(self.experiment, name, list(seeds), sizes, runs, losses, tuning)

    def check(
        self, run: TunedRun, finished: Mapping[tuple[str, float, int, str], RunResult]
    ) -> None:
        """Check that the result of a run, if there is one, is of its settings.

        Raises: ValueError: it is not.
        """
        result = finished.get(run.key)
        if result is not None and result.settings != run.digest:
            raise ValueError(
                f"{self.results.path}: the result of {run.job.name} is of other settings or "
                "another text; name another --results"
            )


def mean_losses(results: Iterable[RunResult]) -> dict[str, dict[float, float]]:
    """Return the mean loss of the tuning seeds, by variant and learning rate."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        if result.held_out == TUNING:
            found[result.variant][result.lr].append(result.loss)
    return {
        name: {lr: statistics.mean(values) for lr, values in rates.items()}
        for name, rates in found.items()
    }


def rates_of(losses: Losses, experiment: Experiment, source: str) -> dict[str, float]:
    """Return the learning rate of each variant.

    Args:
        source: where the losses are from, for the message.

    Raises:
        ValueError: a variant has none, or its best lies at the end of its grid.
    """
    rates = {}
    for variant in experiment.variants:
        found = losses.get(variant.name)
        if not found or next_rate(found) is not None:
            raise ValueError(
                f"{source}: the learning rate of {variant.name} is not tuned there, or its best "
                "lies at the end of the grid"
            )
        rates[variant.name] = best_rate(found)
    return rates
