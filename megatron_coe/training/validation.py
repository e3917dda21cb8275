"""Validation during a run, on the same held-out sequences each time."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_coe.config.run_config import TrainSettings, is_multiple
from megatron_coe.data.indexed import unigram_entropy
from megatron_coe.distributed.train_state import TrainState
from megatron_coe.fault_tolerance.heartbeat import EVALUATION, Heartbeat
from megatron_coe.fault_tolerance.signals import StopRequest
from megatron_coe.training.batch_source import BatchSource
from megatron_coe.training.metrics_logger import NullLogger
from megatron_coe.training.optimizer_step import mean_loss
from megatron_coe.training.step import forward_backward

MICRO_BATCHES_AT_ONCE = 4
"""Of a validation, per pipeline stage, between two checks for signals."""


class Validator:
    """Computes the validation loss; its methods are collectives of all ranks.

    Args:
        train: when a validation is due.
        source: the held-out sequences.
        samples: how many of them there are.
    """

    def __init__(
        self,
        train: TrainSettings,
        train_state: TrainState,
        source: BatchSource,
        samples: int,
        heartbeat: Heartbeat,
    ) -> None:
        self._steps, self._interval = train.steps, train.eval_interval
        self._train_state = train_state
        self._source = source
        self.samples = samples
        self._heartbeat = heartbeat

    def is_due(self, step: int) -> bool:
        """Return whether the model is validated after that step."""
        return step == self._steps or is_multiple(step, self._interval)

    def is_owed(self, step: int, metrics_logger: NullLogger) -> bool:
        """Return whether a signal cut short the validation of the step that a run resumes from."""
        if step == 0 or not self.is_due(step):
            return False
        owed = not metrics_logger.has(step, "valid_loss")
        flag = torch.tensor(int(owed), device=self._source.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    @torch.no_grad()
    def run(self, stop: StopRequest | None = None) -> dict[str, float] | None:
        """Compute the cross-entropy per valid token of the whole held-out set.

        Returns: `valid_loss`; None when a signal that `stop` has received on any rank has cut it
            short.
        """
        self._heartbeat.enter(EVALUATION)
        for chunk in self._train_state.chunks:
            chunk.eval()
        source = self._source
        count = -(-self.samples // (source.micro_batch_size * source.replicas))
        # The interleaved schedule wants a multiple of the stages; what is too much is masked.
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        count = -(-count // stages) * stages
        totals = torch.zeros(2, dtype=torch.float64, device=source.device)
        at_once = MICRO_BATCHES_AT_ONCE * stages
        for begin in range(0, count, at_once):
            if begin and stop and stop.received_on_any_rank(source.device):
                return None
            part = min(at_once, count - begin)
            totals += forward_backward(
                self._train_state,
                partial(source.validation, self.samples, part, begin),
                part,
                source.micro_batch_size,
                self._heartbeat,
            )
        dist.all_reduce(totals)
        return {"valid_loss": mean_loss(*totals.tolist())}

    def final_metrics(self, step: int) -> dict[str, float]:
        """Return the metrics of the last step only: the unigram entropy of the held-out set."""
        if step < self._steps:
            return {}
        return {"unigram_entropy": unigram_entropy(self._source.dataset)}
