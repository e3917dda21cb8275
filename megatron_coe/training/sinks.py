"""Metrics for Weights & Biases and MLflow: what `metrics.jsonl` has, in a run that goes on there.

A sink runs in a thread of its own, from the first record on, so that a server that is slow or gone
costs no step; one that fails is named once, and the run continues without it.
"""

from __future__ import annotations

import importlib.util
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeVar

from megatron_coe.config.run_config import LogSettings
from megatron_coe.utils.files import atomic_path
from megatron_coe.utils.metrics_file import Record
from megatron_coe.utils.run_files import CONFIG_FILE, METRICS_FILE

T = TypeVar("T")
_CLOSING_S = 120.0
"""How long the end of a run waits for a sink to send what it has."""
_PARAMS, _METRICS, _LETTERS = 100, 1000, 6000
"""What a request to MLflow may hold: parameters, metrics, letters of a parameter."""


class Sink(Protocol):
    """An open run of a tracking service."""

    def record(self, step: int, values: Record) -> None:
        """Send a record."""

    def close(self, failed: bool) -> None:
        """Send the rest, and end the run."""


class BackgroundSink:
    """A sink that is opened and fed by a thread; nothing that it does ends the training run.

    Args:
        setting: that asks for it, for messages.
        start: opens it.
        log: prints a line.
    """

    def __init__(self, setting: str, start: Callable[[], Sink], log: Callable[[str], None]) -> None:
        self._setting, self._start, self._log = setting, start, log
        self._queue: SimpleQueue[Callable[[Sink], None] | None] = SimpleQueue()
        self._thread: Thread | None = None

    def record(self, step: int, values: Record) -> None:
        """Send a record some time; the first one opens the sink."""
        if self._thread is None:
            self._thread = Thread(target=self._feed, name=self._setting, daemon=True)
            self._thread.start()
        self._queue.put(lambda sink: sink.record(step, values))

    def close(self, failed: bool = False) -> None:
        """Have the rest sent and the sink closed; `wait` returns when that is done."""
        self._queue.put(lambda sink: sink.close(failed))
        self._queue.put(None)

    def wait(self) -> None:
        """Wait until the sink is closed, if it was opened, but not forever."""
        if self._thread is None:
            return
        self._thread.join(_CLOSING_S)
        if self._thread.is_alive():
            self._log(f"warning: {self._setting}: not all metrics were sent in {_CLOSING_S:.0f} s")

    def _feed(self) -> None:
        try:
            sink = self._start()
            while (send := self._queue.get()) is not None:
                send(sink)
        except BaseException as error:  # wandb exits where it may not ask for a key
            said = " ".join(str(error).split()) or type(error).__name__
            self._log(f"warning: {self._setting}: no more metrics are sent ({said})")


class WandbSink:
    """A run of Weights & Biases; lists become histograms with a bar for each of their numbers.

    Records have their step as a metric, which is the axis of all others: W&B's own would not take
    what becomes known later than its step.
    """

    def __init__(self, log: LogSettings, config: dict[str, object], resumes: bool) -> None:
        import wandb

        file = Path(log.dir, "wandb_run_id")
        if not (resumes and file.exists()):
            _write(file, secrets.token_hex(4))
        self._wandb = wandb
        self._run = wandb.init(
            project=log.wandb_project,
            name=log.wandb_exp_name,
            dir=log.dir,
            config=config,
            id=file.read_text(encoding="utf-8"),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("*", step_metric="step")

    def record(self, step: int, values: Record) -> None:
        self._run.log({"step": step} | {name: self._shown(v) for name, v in values.items()})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _shown(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return self._wandb.Histogram(np_histogram=(value, list(range(len(value) + 1))))


class MlflowSink:
    """A run of MLflow: numbers as metrics, and at the end the whole `metrics.jsonl`, with lists."""

    def __init__(self, log: LogSettings, config: dict[str, object], resumes: bool) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._folder = Path(log.dir)
        self._client = client = MlflowClient(log.mlflow_tracking_uri)
        file = self._folder / "mlflow_run_id"
        if resumes and file.exists():
            self._run_id = file.read_text(encoding="utf-8")
            client.update_run(self._run_id, status="RUNNING")
            return
        found = client.get_experiment_by_name(log.mlflow_experiment)
        experiment = (
            found.experiment_id if found else client.create_experiment(log.mlflow_experiment)
        )
        self._run_id = client.create_run(experiment, run_name=log.mlflow_run_name).info.run_id
        _write(file, self._run_id)
        params = [Param(key, str(value)[:_LETTERS]) for key, value in _flat("", config)]
        for some in _chunks(params, _PARAMS):
            client.log_batch(self._run_id, params=some)

    def record(self, step: int, values: Record) -> None:
        from mlflow.entities import Metric

        now_ms = time.time_ns() // 10**6
        numbers = [
            Metric(name, value, now_ms, step)
            for name, value in values.items()
            if not isinstance(value, list)
        ]
        for some in _chunks(numbers, _METRICS):
            self._client.log_batch(self._run_id, metrics=some)

    def close(self, failed: bool) -> None:
        for name in (CONFIG_FILE, METRICS_FILE):
            if (self._folder / name).exists():
                self._client.log_artifact(self._run_id, str(self._folder / name))
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


_SINKS: dict[str, Callable[[LogSettings, dict[str, object], bool], Sink]] = {
    "wandb_project": WandbSink,
    "mlflow_experiment": MlflowSink,
}
"""Setting of section `log` -> the sink that it asks for, of the package that it begins with."""


def check_sinks(log: LogSettings) -> None:
    """Raise ValueError if a sink is asked for whose package is not installed."""
    for name in _wanted(log):
        package = name.partition("_")[0]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # or a folder of that name, as wandb makes
            raise ValueError(
                f"log.{name}={getattr(log, name)!r} needs the package {package}: "
                f"`pip install {package}`"
            )


def make_sinks(
    log: LogSettings, config: dict[str, object], resumes: bool, say: Callable[[str], None]
) -> list[BackgroundSink]:
    """Return the sinks that the settings ask for, none of them open yet.

    Args:
        config: all settings of the run.
        resumes: continue the run there, if there is one.
        say: prints a line.
    """
    return [
        BackgroundSink(f"log.{name}", partial(_SINKS[name], log, config, resumes), say)
        for name in _wanted(log)
    ]


def _wanted(log: LogSettings) -> list[str]:
    return [name for name in _SINKS if getattr(log, name)]


def _write(file: Path, text: str) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _flat(key: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield every setting by its dotted key."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(f"{key}.{name}" if key else name, part)
    else:
        yield key, value


def _chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk
