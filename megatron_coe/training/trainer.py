"""The training loop on megatron.core alone: steps, validation, checkpoints and reports."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from megatron_coe.checkpoint.checkpointer import Checkpointer
from megatron_coe.checkpoint.state import Progress
from megatron_coe.config.run_config import Settings
from megatron_coe.config.validation import num_microbatches
from megatron_coe.data.indexed import unigram_entropy
from megatron_coe.distributed.train_state import TrainState
from megatron_coe.fault_tolerance.exceptions import NotFiniteError
from megatron_coe.fault_tolerance.heartbeat import EVALUATION, SAVING, STEP, Heartbeat
from megatron_coe.fault_tolerance.loss_spikes import LossSpikeDetector
from megatron_coe.fault_tolerance.nonfinite import diagnose
from megatron_coe.fault_tolerance.signals import StopRequest
from megatron_coe.megatron_compat.versions import forget_balance_losses
from megatron_coe.training.batch_source import BatchSource
from megatron_coe.training.grad_norms import GradientNorms
from megatron_coe.training.loss import (
    Batch,
    count_valid_tokens,
    loss_scale,
)
from megatron_coe.training.metrics_logger import MetricsLogger
from megatron_coe.training.optimizer_step import (
    StepStart,
    agreed_loss,
    apply_update,
    mean_loss,
    prepare_update,
)
from megatron_coe.training.profiling import StepProfiler
from megatron_coe.training.step import forward_backward
from megatron_coe.training.step_metrics import MetricsCollector, StepMetrics
from megatron_coe.utils.metrics_file import Record
from megatron_coe.utils.ranks import is_rank_0

VALIDATED_AT_ONCE = 4
"""Micro-batches of a validation, per pipeline stage, between two looks at the signals."""


@dataclass(frozen=True)
class Validation:
    """The held-out sequences that every validation reads."""

    source: BatchSource
    samples: int


class Trainer:
    """Runs the steps of a rank; its methods are collectives of all ranks.

    Args:
        settings: of the run.
        train_state: what is trained, changed in place.
        train: the training sequences.
        validation: None when there is no held-out set.
        progress: how far training has come, counted on in place.
        metrics_logger: where figures go, on rank 0; None on the others.
        heartbeat: told what this rank is doing.
        checkpointer: writes the checkpoints; None: one of its own.
    """

    def __init__(
        self,
        settings: Settings,
        train_state: TrainState,
        train: BatchSource,
        validation: Validation | None,
        progress: Progress,
        metrics_logger: MetricsLogger | None,
        heartbeat: Heartbeat | None = None,
        checkpointer: Checkpointer | None = None,
    ) -> None:
        self.settings = settings
        self.train_state = train_state
        self.train = train
        self.validation = validation
        self.progress = progress
        self.metrics_logger = metrics_logger
        self.checkpointer = checkpointer or Checkpointer(settings.checkpoint, settings.to_yaml())
        self.heartbeat = heartbeat or Heartbeat()
        self.heartbeat.track(train_state.chunks)
        self.num_microbatches = num_microbatches(settings, dist.get_world_size())
        if train_state.optimizer is not None:
            self._gradient_norms = GradientNorms(train_state.optimizer, train_state.chunks)
        self._collector = MetricsCollector(
            train_state, settings.train, self.num_microbatches, train.device
        )
        self._seconds = 0.0
        self._start = StepStart(train_state.chunks)
        self._spike_detector = LossSpikeDetector()

    def run(self, stop: StopRequest | None = None) -> signal.Signals | None:
        """Train from the present step to the last one, and save it.

        A signal that `stop` has received on any rank ends the run before the next step, saved, or
        in the midst of a validation, which the resumed run makes up for.

        Returns:
            that signal; None when the last step was done.

        Raises:
            NotFiniteError: on all ranks; the step before is saved.
        """
        train, last = self.settings.train, self.last_step
        profiler = StepProfiler(self.settings.log, enabled=is_rank_0())
        if self.metrics_logger is not None:
            self._seconds = self.metrics_logger.latest("seconds") or 0.0
        stop = stop or StopRequest()
        saved = self.progress.step
        owed = self._owes_validation()
        while owed or self.progress.step < last:
            self._complete_save(wait=False)
            if reason := stop.received_on_any_rank(self.train.device):
                if self.progress.step > saved:
                    self.save()
                self._complete_save(wait=True)
                if self.metrics_logger is not None:
                    self.metrics_logger.log(
                        f"stopped by {reason.name} after step {self.progress.step}"
                    )
                return reason
            record = {}
            if not owed:
                with profiler.step(self.progress.step + 1):
                    try:
                        outcome = self.step()
                    except NotFiniteError as error:
                        if error.weights_are_finite and self.progress.step > saved:
                            self.save()
                        self._complete_save(wait=True)
                        raise
                record = self._report(outcome)
            step = self.progress.step
            late, owed = owed, False
            if late or step == train.steps or _due(step, train.eval_interval):
                validated = self.evaluate(stop)
                owed = validated is None
                record |= validated or {}
            if step == train.steps and not owed and self.validation and self.metrics_logger:
                # What a model without any context reaches, beside what this one has reached.
                record["unigram_entropy"] = unigram_entropy(self.validation.source.dataset)
            if self.metrics_logger is not None and record:
                self.metrics_logger.record(step, record | self._position())
            if not late and (step == last or _due(step, self.settings.checkpoint.save_interval)):
                self.save()
                saved = step
        self._complete_save(wait=True)
        return None

    def step(self) -> StepMetrics:
        """One update of the weights; none where loss or gradients are not finite.

        Raises:
            NotFiniteError: such a step is not to be skipped; nothing has changed by it.
        """
        started_s = time.perf_counter()
        self.heartbeat.enter(STEP, self.progress.step + 1)
        train_state = self.train_state
        self._start.note()
        batches = self.train.training(self.progress.samples, self.num_microbatches)
        is_reported = self._is_reported(self.progress.step + 1)
        with self._collector.watching(is_reported):
            totals = self._gradients(batches)
        lr = get_canonical_lr_for_logging(train_state.optimizer.param_groups)
        grad_norm = prepare_update(train_state.optimizer)
        grad_norms = self._gradient_norms.measure() if is_reported else {}
        loss, finite = agreed_loss(totals, grad_norm)
        skipped = None
        if finite:
            apply_update(train_state.optimizer, grad_norm)
            self.progress.skipped_in_row = 0
        else:
            skipped = self._skip(batches, loss, grad_norm)
        train_state.schedule.step(1)
        self.progress.step += 1
        self.progress.samples += self.settings.train.global_batch_size
        if is_reported and self.train.device.type == "cuda":
            torch.cuda.synchronize()  # the update is only launched: it belongs to this step's time
        seconds = time.perf_counter() - started_s
        self._seconds += seconds
        return StepMetrics(loss, lr, grad_norm, grad_norms, seconds, skipped)

    def _gradients(self, batches: list[Batch]) -> torch.Tensor:
        """Gradients of the objective, summed over all ranks; returns this rank's totals."""
        valid_tokens = count_valid_tokens(batches, parallel_state.get_data_parallel_group())
        positions = self.settings.train.global_batch_size * self.train_state.provider.seq_length
        scale = loss_scale(valid_tokens, positions)
        for chunk in self.train_state.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.train_state.optimizer.zero_grad()
        forget_balance_losses()  # so that reports show one step, wherever the run began
        return self._forward_backward(lambda: iter(batches), self.num_microbatches, scale)

    def _skip(self, batches: list[Batch], loss: float, grad_norm: float) -> str:
        """Undo what a bad step has changed, and say why; NotFiniteError if it cannot be skipped."""
        train, progress = self.settings.train, self.progress
        self._start.put_back()
        found = diagnose(
            self.train_state.chunks,
            lambda: self._gradients(batches),
            self.train.numbers(progress.samples, self.num_microbatches),
            loss,
            grad_norm,
        )
        self._start.put_back()
        report = f"step {progress.step + 1} is not finite: {found.text}; nothing was updated"
        if train.nonfinite == "stop":
            raise NotFiniteError(report, found.weights_are_finite)
        if not found.weights_are_finite or progress.skipped_in_row >= train.max_skipped_steps:
            row = f"; {progress.skipped_in_row} steps before it were skipped"
            raise NotFiniteError(report + row, found.weights_are_finite)
        progress.skipped += 1
        progress.skipped_in_row += 1
        return report

    @torch.no_grad()
    def evaluate(self, stop: StopRequest | None = None) -> dict[str, float] | None:
        """Cross-entropy per valid token of the whole held-out set; empty when there is none.

        None when a signal that `stop` has received on any rank has cut it short.
        """
        if self.validation is None:
            return {}
        self.heartbeat.enter(EVALUATION)
        for chunk in self.train_state.chunks:
            chunk.eval()
        source, samples = self.validation.source, self.validation.samples
        count = -(-samples // (source.micro_batch_size * source.replicas))
        # The interleaved schedule wants a multiple of the stages; what is too much is masked.
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        count = -(-count // stages) * stages
        totals = torch.zeros(2, dtype=torch.float64, device=self.train.device)
        at_once = VALIDATED_AT_ONCE * stages
        for begin in range(0, count, at_once):
            if begin and stop and stop.received_on_any_rank(self.train.device):
                return None
            part = min(at_once, count - begin)
            totals += self._forward_backward(
                lambda part=part, begin=begin: source.validation(samples, part, begin), part
            )
        dist.all_reduce(totals)
        return {"valid_loss": mean_loss(*totals.tolist())}

    def validate(self) -> None:
        """Report the validation loss of the model as it is, on the console only."""
        loss = (self.evaluate() or {}).get("valid_loss")
        if self.metrics_logger is not None:
            measured = "no held-out set (data.valid)" if loss is None else f"{loss:.6f}"
            self.metrics_logger.log(f"step {self.progress.step} | valid loss {measured}")

    def save(self) -> None:
        """Write a checkpoint, or begin to, where `checkpoint.save` names a folder."""
        self.heartbeat.enter(SAVING)
        self.checkpointer.save(self.train_state, self.progress)

    def _complete_save(self, wait: bool) -> None:
        """Complete what is written in the background, once all ranks have written it."""
        if self.checkpointer.is_pending:
            self.heartbeat.enter(SAVING)
            if wait:
                self.checkpointer.finish()
            else:
                self.checkpointer.poll()

    def metrics(self, step: StepMetrics) -> Record:
        """What is reported of a training step that has updated the weights. A collective."""
        return self._collector.read(step)

    @property
    def last_step(self) -> int:
        """At which this process ends."""
        train = self.settings.train
        return min(train.steps, train.stop_step or train.steps)

    def _is_reported(self, step: int) -> bool:
        return step in (1, self.last_step) or _due(step, self.settings.log.interval)

    def _position(self) -> dict[str, float]:
        """How far the run has come: in the data, and in seconds spent in steps."""
        samples = self.progress.samples
        position = {"samples": samples, "tokens": samples * self.train_state.provider.seq_length}
        if self.train.samples_per_epoch:
            position["epoch"] = samples / self.train.samples_per_epoch
        return position | {"seconds": self._seconds}

    def _report(self, outcome: StepMetrics) -> Record:
        """The record of a step, empty where none is due; what is out of the way is said at once."""
        step, record = self.progress.step, {}
        if self.metrics_logger is not None:
            self.metrics_logger.advance()
        if outcome.skipped:
            if self.metrics_logger is not None:
                self.metrics_logger.log(f"warning: {outcome.skipped}: skipped")
            return {"skipped_steps": self.progress.skipped}
        if self._is_reported(step):
            record = self.metrics(outcome)
        if (score := self._spike_detector.score(outcome.loss)) is not None:
            record |= {"train_loss": outcome.loss, "loss_spike": score}
            if self.metrics_logger is not None:
                self.metrics_logger.log(
                    f"warning: step {step}: the loss, {outcome.loss:.4f}, lies {score:.0f} "
                    "standard deviations above the median of the latest steps"
                )
        return record

    def _owes_validation(self) -> bool:
        """Whether a signal cut short the validation that belongs to the step resumed from."""
        step, train = self.progress.step, self.settings.train
        if step == 0 or not (step == train.steps or _due(step, train.eval_interval)):
            return False
        owed = self.metrics_logger is not None and not self.metrics_logger.has(step, "valid_loss")
        flag = torch.tensor(int(owed and self.validation is not None), device=self.train.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _forward_backward(
        self, batches: Callable[[], Iterator[Batch]], count: int, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        size = self.train.micro_batch_size
        return forward_backward(self.train_state, batches, count, size, self.heartbeat, scale)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
