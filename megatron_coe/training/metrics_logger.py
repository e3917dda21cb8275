"""Metrics of a run: console, metrics.jsonl, TensorBoard and, when asked for, W&B and MLflow."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from megatron_coe.config.run_config import LogSettings, is_multiple
from megatron_coe.training.sinks import make_sinks
from megatron_coe.training.straggler import work_ratio
from megatron_coe.utils.metrics_file import Record, drop_records_after, read_records
from megatron_coe.utils.run_files import METRICS_FILE

# name in the record -> what the console shows of it
_CONSOLE: dict[str, Callable[[float], str]] = {
    "train_loss": "loss {:.4f}".format,
    "valid_loss": "valid loss {:.4f}".format,
    "exact_match": "exact match {:.3f}".format,
    "unigram_entropy": "unigram entropy {:.4f}".format,
    "lr": "lr {:.3e}".format,
    "grad_norm": "grad norm {:.3f}".format,
    "tokens_per_second": "tokens/s {:,.0f}".format,
    "flops_per_second": lambda rate: f"{_with_prefix(rate)}FLOP/s",
    "mfu": "MFU {:.1%}".format,
    "loss_spike": "SPIKE {:.0f}".format,
    "skipped_steps": "SKIPPED {:.0f}".format,
}
_OF_SET = "valid_loss/"
_BALANCE = re.compile(r"balance/.*/iteration_\d+")  # the means over layers


class NullLogger:
    """Knows when a record is due, as all ranks must, and writes nothing.

    Args:
        last_step: at which the process ends.
    """

    is_enabled = False

    def __init__(self, log: LogSettings, last_step: int) -> None:
        self._interval, self._last_step = log.interval, last_step

    def is_due(self, step: int) -> bool:
        """Return whether the step's metrics are recorded."""
        return step in (1, self._last_step) or is_multiple(step, self._interval)

    def log(self, text: str) -> None:
        """Print a line on the console, above the progress bar if there is one."""

    def advance(self) -> None:
        """Move the progress bar by one step."""

    def record(self, step: int, values: Record) -> None:
        """Write one record everywhere."""

    def has(self, step: int, name: str) -> bool:
        """Return whether a metric of that step has been recorded, as far as is known."""
        return True

    def latest(self, name: str) -> float | None:
        """Return the newest value of a metric; None if there is none."""
        return None

    def close(self, failed: bool = False) -> None:
        """Flush and close whatever is open.

        Args:
            failed: the run ends with an error.
        """


class MetricsLogger(NullLogger):
    """Writes the metrics of a run; made on rank 0 only.

    `metrics.jsonl` holds one record per line, in order of steps, and survives a resume: records
    past the step resumed from are dropped, for they are about to be made again. W&B and MLflow
    cannot drop what they have, so that the same metrics of these steps are not sent twice.
    """

    is_enabled = True

    def __init__(
        self,
        log: LogSettings,
        total_steps: int,
        completed_steps: int,
        config: dict[str, object],
        stream: TextIO | None = None,
        last_step: int | None = None,
        samples_after: Callable[[int], int] = int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds; readers go without

        super().__init__(log, last_step or total_steps)
        self.directory = Path(log.dir)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.path = self.directory / METRICS_FILE
        dropped = drop_records_after(self.path, completed_steps)
        resumes = completed_steps > 0
        self._sent = {(record["step"], name) for record in dropped if resumes for name in record}
        self._sinks = make_sinks(log, config, resumes, self.log)
        self._stream = stream = stream or sys.stdout
        self._width = len(str(total_steps))
        self._total_steps = total_steps
        self._pace = _Pace(self._last_step, samples_after, clock)
        self._tensorboard = SummaryWriter(
            str(self.directory / "tensorboard"),
            purge_step=completed_steps + 1 if completed_steps else None,
        )
        self._bar = (
            tqdm(
                total=total_steps,
                initial=completed_steps,
                unit="step",
                file=stream,
                dynamic_ncols=True,
            )
            if stream.isatty()
            else None
        )

    def log(self, text: str) -> None:
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def record(self, step: int, values: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, list):
                self._tensorboard.add_histogram_raw(name, **_bars(value), global_step=step)
            else:
                self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()
        if unsent := {name: v for name, v in values.items() if (step, name) not in self._sent}:
            for sink in self._sinks:
                sink.record(step, unsent)
        parts = [f"step {step:{self._width}d}/{self._total_steps}", console_line(values)]
        if "seconds" in values:
            parts += self._pace.times(step)
        self.log(" | ".join(parts))

    def has(self, step: int, name: str) -> bool:
        return any(record["step"] == step and name in record for record in self._records())

    def latest(self, name: str) -> float | None:
        found = [record[name] for record in self._records() if name in record]
        return found[-1] if found else None

    def _records(self) -> list[Record]:
        return read_records(self.path) if self.path.exists() else []

    def close(self, failed: bool = False) -> None:
        if self._bar is not None:
            self._bar.close()
        self._tensorboard.close()
        for sink in self._sinks:
            sink.close(failed)
        for sink in self._sinks:
            sink.wait()


class _Pace:
    """The time since a process has begun to train, and how much more it takes.

    Args:
        samples_after: the sequences that so many steps consume, in any unit: what takes the time.
    """

    def __init__(
        self, last_step: int, samples_after: Callable[[int], int], clock: Callable[[], float]
    ) -> None:
        self._last_step, self._samples_after, self._clock = last_step, samples_after, clock
        self._started_s = clock()
        self._first: tuple[int, float] | None = None

    def times(self, step: int) -> list[str]:
        """Return the times at a step; that left follows from the steps since the first one shown.

        What happens between steps, as validations and checkpoints, is in it.
        """
        now_s = self._clock()
        shown = [f"elapsed {_clock_time(now_s - self._started_s)}"]
        first, first_s = self._first = self._first or (step, now_s)
        if step > first:
            before, now, end = map(self._samples_after, (first, step, self._last_step))
            left_s = (now_s - first_s) / (now - before) * (end - now)
            shown.append(f"left {_clock_time(left_s)}")
        return shown


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def console_line(values: Record) -> str:
    """Return the console line of a record: known metrics in fixed order, then those by name."""
    parts = [show(values[name]) for name, show in _CONSOLE.items() if name in values]
    parts += [
        f"valid loss/{name.removeprefix(_OF_SET)} {value:.4f}"
        for name, value in values.items()
        if name.startswith(_OF_SET)
    ]
    if (ratio := work_ratio(values)) > 1:
        parts.append(f"slowest rank {values['slowest_rank']} x{ratio:.2f}")
    balance = [f"{value:.3f}" for name, value in values.items() if _BALANCE.fullmatch(name)]
    if balance:
        parts.append(f"balance {' '.join(balance)}")
    return " | ".join(parts)


def _with_prefix(value: float) -> str:
    """Return a positive number and its decimal prefix, to be followed by a unit."""
    power = min(int(math.log10(max(value, 1.0))) // 3, 6)
    return f"{value / 1000**power:.1f} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}"


def _bars(heights: list[float]) -> dict[str, float | list[float]]:
    """Return a histogram for TensorBoard whose bar number i is as high as `heights[i]`."""
    centers = range(len(heights))
    return {
        "min": -0.5,
        "max": len(heights) - 0.5,
        "num": sum(heights),
        "sum": sum(i * height for i, height in zip(centers, heights, strict=True)),
        "sum_squares": sum(i * i * height for i, height in zip(centers, heights, strict=True)),
        "bucket_limits": [i + 0.5 for i in centers],
        "bucket_counts": heights,
    }
