"""The training loop on megatron.core alone."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

from megatron_coe.checkpoint.checkpointer import Checkpointer
from megatron_coe.checkpoint.state import Progress
from megatron_coe.config.run_config import TrainSettings, is_multiple
from megatron_coe.distributed.train_state import TrainState
from megatron_coe.fault_tolerance.exceptions import NotFiniteError
from megatron_coe.fault_tolerance.heartbeat import SAVING, Heartbeat
from megatron_coe.fault_tolerance.loss_spikes import LossSpikeDetector
from megatron_coe.fault_tolerance.signals import StopRequest
from megatron_coe.training.batch_source import BatchSource
from megatron_coe.training.hf_export import HfExporter
from megatron_coe.training.metrics_logger import NullLogger
from megatron_coe.training.profiling import StepProfiler
from megatron_coe.training.step import TrainStep
from megatron_coe.training.step_metrics import StepMetrics
from megatron_coe.training.straggler import StragglerReport
from megatron_coe.training.validation import Validator
from megatron_coe.utils.metrics_file import Record


@dataclass
class Trainer:
    """The training loop of a rank; its methods are collectives of all ranks.

    Attributes:
        settings: section `train`.
        train_state: updated in place.
        source: the training sequences.
        validator: None when there is no held-out set.
        progress: steps and samples so far, updated in place.
        metrics_logger: writes records on rank 0, and nothing on the others.
        checkpointer: writes checkpoints when they are due.
        profiler: traces the steps that `log.profile_steps` names.
        heartbeat: notes what this rank is doing.
        exporter: exports complete checkpoints, on rank 0; None: there is nothing to export.
    """

    settings: TrainSettings
    train_state: TrainState
    source: BatchSource
    validator: Validator | None
    progress: Progress
    metrics_logger: NullLogger
    checkpointer: Checkpointer
    profiler: StepProfiler
    heartbeat: Heartbeat
    exporter: HfExporter | None = None

    def __post_init__(self) -> None:
        self.heartbeat.track(self.train_state.chunks)
        if self.train_state.optimizer is not None:
            self.train_step = TrainStep(
                self.settings, self.train_state, self.source, self.heartbeat
            )
            self._straggler = StragglerReport(self.train_step.collector.hosts)
        self._spike_detector = LossSpikeDetector()
        self._saved_step = 0
        self._seconds = 0.0

    def run(self, stop: StopRequest | None = None) -> signal.Signals | None:
        """Train from the present step to the last one, and save it.

        A signal that `stop` has received on any rank ends the run before the next step, saved, or
        during a validation, which the resumed run then does.

        Returns: that signal; None when the last step was done.

        Raises:
            NotFiniteError: on all ranks; the step before is saved.
        """
        stop, validator = stop or StopRequest(), self.validator
        self._saved_step = self.progress.step
        self._seconds = self.metrics_logger.latest("seconds") or 0.0
        owed = validator is not None and validator.is_owed(self.progress.step, self.metrics_logger)
        # A validation that a signal cut short is owed: the next round makes it, and no step.
        while owed or self.progress.step < self.last_step:
            self._complete_save(wait=False)
            self.record_exports()
            if reason := stop.received_on_any_rank(self.source.device):
                return self._end(reason)
            record = {} if owed else self._train()
            step, late, owed = self.progress.step, owed, False
            if validator and (late or validator.is_due(step)):
                validated = validator.run(stop)
                owed = validated is None
                record |= validated or {}
                if not owed and self.metrics_logger.is_enabled:
                    record |= validator.final_metrics(step)
            if record:
                self.metrics_logger.record(step, record | self._position())
            if not late and self.checkpointer.is_due(step, self.last_step):
                self.save()
        self._complete_save(wait=True)
        return None

    def step(self) -> StepMetrics:
        """Make one update of the weights. Raises: NotFiniteError, as `TrainStep.run`."""
        is_logged = self._is_logged(self.progress.step + 1)
        with self.train_step.collector.timing(is_logged):
            outcome = self.train_step.run(self.progress, is_logged)
        self._seconds += outcome.seconds
        return outcome

    def metrics(self, step: StepMetrics) -> Record:
        """Return the record of a training step that has updated the weights. A collective."""
        return self.train_step.collector.read(step)

    def validate(self) -> None:
        """Log the validation losses of the model as it is, on the console only."""
        measured = "valid loss no held-out set (data.valid)"
        if self.validator:
            measured = _losses(self.validator.run() or {})
        self.metrics_logger.log(f"step {self.progress.step} | {measured}")
        if self.validator and self.train_state.average is not None:
            with self.train_state.average.in_place_of_weights():
                measured = _losses(self.validator.run() or {})
            self.metrics_logger.log(f"of the moving average | {measured}")

    def save(self) -> None:
        """Write a checkpoint, or start writing it, where `checkpoint.save` names a folder."""
        self.heartbeat.enter(SAVING)
        self.checkpointer.save(self.train_state, self.progress)
        self._saved_step = self.progress.step

    def record_exports(self, is_stopped: Callable[[], bool] | None = None) -> None:
        """Record the scores of exports that are done.

        Args:
            is_stopped: wait for all exports, until this is true.
        """
        if self.exporter:
            exporter = self.exporter
            found = exporter.finish(is_stopped) if is_stopped else exporter.results()
            for step, values in found:
                self.metrics_logger.record(step, values)

    @property
    def has_failed_exports(self) -> bool:
        """Return whether an export has failed, as rank 0 knows."""
        return self.exporter is not None and self.exporter.failures > 0

    @property
    def last_step(self) -> int:
        """The step at which this process ends."""
        return last_step(self.settings)

    def _train(self) -> Record:
        """Make a step; return its record, empty where none is due."""
        try:
            with self.profiler.step(self.progress.step + 1):
                outcome = self.step()
        except NotFiniteError as error:
            if error.weights_are_finite:
                self._save_if_new()
            self._complete_save(wait=True)
            raise
        step, record = self.progress.step, {}
        self.metrics_logger.advance()
        if outcome.skipped:
            self.metrics_logger.log(f"warning: {outcome.skipped}: skipped")
            return {"skipped_steps": self.progress.skipped}
        if self._is_logged(step):
            record = self.metrics(outcome)
            if straggler := self._straggler.notice(step, record):
                self.metrics_logger.log(straggler)
        if (score := self._spike_detector.score(outcome.loss)) is not None:
            record |= {"train_loss": outcome.loss, "loss_spike": score}
            self.metrics_logger.log(
                f"warning: step {step}: the loss, {outcome.loss:.4f}, lies {score:.0f} "
                "standard deviations above the median of the latest steps"
            )
        return record

    def _is_logged(self, step: int) -> bool:
        """Return whether a step has a record, as one that is exported must."""
        exports = self.checkpointer.options.hf_interval
        return self.metrics_logger.is_due(step) or is_multiple(step, exports)

    def _end(self, reason: signal.Signals) -> signal.Signals:
        if self.exporter:
            self.exporter.cancel()
        self._save_if_new()
        self._complete_save(wait=True)
        self.metrics_logger.log(f"stopped by {reason.name} after step {self.progress.step}")
        return reason

    def _save_if_new(self) -> None:
        if self.progress.step > self._saved_step:
            self.save()

    def _complete_save(self, wait: bool) -> None:
        """Complete a save in the background, once all ranks have written their shards."""
        if self.checkpointer.is_pending:
            self.heartbeat.enter(SAVING)
            if wait:
                self.checkpointer.finish()
            else:
                self.checkpointer.poll()

    def _position(self) -> dict[str, float]:
        """Return samples, tokens and epochs so far, and the seconds spent in steps."""
        samples = self.progress.samples
        position: dict[str, float] = {
            "samples": samples,
            "tokens": samples * self.train_state.provider.seq_length,
        }
        if self.source.samples_per_epoch:
            position["epoch"] = samples / self.source.samples_per_epoch
        return position | {"seconds": self._seconds}


def _losses(found: Record) -> str:
    return " | ".join(f"{name.replace('_', ' ')} {loss:.6f}" for name, loss in found.items())


def last_step(train: TrainSettings) -> int:
    """Return the step at which a process ends: `exit_step`, or the last of all."""
    return min(train.steps, train.exit_step or train.steps)
