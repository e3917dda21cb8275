"""Recorded runs: metrics, settings, and steps, tokens, FLOPs and time at each record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_coe.config.loader import load_settings
from megatron_coe.config.run_config import Settings
from megatron_coe.config.schedules import batch_schedule
from megatron_coe.utils.metrics_file import Record, read_records
from megatron_coe.utils.run_files import CONFIG_FILE, METRICS_FILE

if TYPE_CHECKING:
    from megatron_coe.model.provider import CoEModelProvider


@dataclass(frozen=True)
class Run:
    """A run's metrics and the settings beside them.

    Attributes:
        metrics: its metrics.jsonl.
        records: one for each logged step, in order of steps.
    """

    metrics: Path
    records: list[Record]

    @staticmethod
    def read(path: Path) -> Run:
        """Read the run of a folder, or of a metrics.jsonl.

        Raises:
            ValueError: a record is broken.
            OSError: there is no such file.
        """
        metrics = path if path.suffix == ".jsonl" else path / METRICS_FILE
        return Run(metrics, read_records(metrics))

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.metrics.resolve().parent.name

    @cached_property
    def settings(self) -> Settings:
        """The settings beside the metrics.

        Raises:
            ValueError: they are broken.
            OSError: there are none.
        """
        return load_settings(self.metrics.parent / CONFIG_FILE)

    def values(self, name: str, axis: str = "steps") -> list[tuple[float, float]]:
        """Return the points (position on the axis, value) of a metric, where it was recorded.

        Args:
            name: of the metric.
            axis: one of `AXES`.

        Raises:
            ValueError: the settings or records lack what the axis needs.
            OSError: there are no settings.
        """
        points = [
            (number, record[name]) for number, record in enumerate(self.records) if name in record
        ]
        positions = list(_AXES[axis][1](self)) if points else []
        return [(positions[number], value) for number, value in points]

    def _steps(self) -> Sequence[float]:
        return [record["step"] for record in self.records]

    def _tokens(self) -> Sequence[float]:
        """Return the recorded tokens, or those of the steps' batches."""
        if all("tokens" in record for record in self.records):
            return [record["tokens"] for record in self.records]
        batches = batch_schedule(self.settings.train)
        return [
            batches.samples_after(int(record["step"])) * self._seq_length for record in self.records
        ]

    @property
    def _seq_length(self) -> int:
        length = self.settings.model.get("seq_length")
        return length if isinstance(length, int) else self._provider.seq_length

    @cached_property
    def _provider(self) -> CoEModelProvider:
        from megatron_coe.conversion.stored_model import provider_of  # imports Megatron: seconds

        return provider_of(self.settings)

    def _flops(self) -> Sequence[float]:
        per_token = self._provider.flops_per_token(seq_length=self._seq_length)
        return [tokens * per_token for tokens in self._tokens()]

    def _seconds(self) -> Sequence[float]:
        """Return the recorded seconds, or estimate them from tokens and tokens per second.

        Records without a rate (of a validation alone) take the next one's.
        """
        if all("seconds" in record for record in self.records):
            return [record["seconds"] for record in self.records]
        rates = [record.get("tokens_per_second") for record in self.records]
        if not any(rates):
            raise ValueError(f"{self.metrics}: records neither seconds nor tokens_per_second")
        seconds, elapsed, before = [], 0.0, 0.0
        for number, tokens in enumerate(self._tokens()):
            rate = next(r for r in [*rates[number:], *rates[number::-1]] if r)
            elapsed += (tokens - before) / rate
            before = tokens
            seconds.append(elapsed)
        return seconds


_AXES: dict[str, tuple[str, Callable[[Run], Sequence[float]]]] = {
    "steps": ("step", Run._steps),
    "tokens": ("tokens", Run._tokens),
    "flops": ("training FLOPs of the model", Run._flops),
    "time": ("seconds of training", Run._seconds),
}

AXES = tuple(_AXES)


def axis_label(axis: str) -> str:
    """Return the label of an axis, one of `AXES`."""
    return _AXES[axis][0]
