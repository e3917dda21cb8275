"""Validation during a run, on the same held-out sequences each time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_coe.config.run_config import TrainSettings, is_multiple
from megatron_coe.data.indexed import count_targets, entropy
from megatron_coe.distributed.train_state import TrainState
from megatron_coe.fault_tolerance.heartbeat import EVALUATION, Heartbeat
from megatron_coe.fault_tolerance.signals import StopRequest
from megatron_coe.training.batch_source import BatchSource
from megatron_coe.training.metrics_logger import NullLogger
from megatron_coe.training.optimizer_step import mean_loss
from megatron_coe.training.step import forward_backward

MICRO_BATCHES_AT_ONCE = 4
"""Of a validation, per pipeline stage, between two checks for signals."""


VALID_LOSS = "valid_loss"
ENTROPY = "unigram_entropy"


@dataclass(frozen=True)
class HeldOutSet:
    """Held-out sequences whose loss is reported."""

    source: BatchSource
    samples: int
    """How many of them there are."""


class Validator:
    """Computes validation losses; its methods are collectives of all ranks.

    Args:
        train: when a validation is due.
        sets: the held-out sets by name; the only one may be called "".
    """

    def __init__(
        self,
        train: TrainSettings,
        train_state: TrainState,
        sets: Mapping[str, HeldOutSet],
        heartbeat: Heartbeat,
    ) -> None:
        self._steps, self._interval = train.steps, train.eval_interval
        self._train_state = train_state
        self._sets = sets
        self._device = next(iter(sets.values())).source.device
        self._heartbeat = heartbeat

    @property
    def samples(self) -> dict[str, int]:
        """Return the number of sequences in each set."""
        return {name: held_out.samples for name, held_out in self._sets.items()}

    def is_due(self, step: int) -> bool:
        """Return whether the model is validated after that step."""
        return step == self._steps or is_multiple(step, self._interval)

    def is_owed(self, step: int, metrics_logger: NullLogger) -> bool:
        """Return whether a signal cut short the validation of the step that a run resumes from."""
        if step == 0 or not self.is_due(step):
            return False
        owed = not metrics_logger.has(step, VALID_LOSS)
        flag = torch.tensor(int(owed), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    @torch.no_grad()
    def run(self, stop: StopRequest | None = None) -> dict[str, float] | None:
        """Compute the cross-entropy per valid token of the held-out sets.

        Returns: `valid_loss` of all sets together, and `valid_loss/NAME` of each that has a name;
            None when a signal that `stop` has received on any rank has cut it short.
        """
        self._heartbeat.enter(EVALUATION)
        for chunk in self._train_state.chunks:
            chunk.eval()
        of_all, losses = torch.zeros(2, dtype=torch.float64), {}
        for number, (name, held_out) in enumerate(self._sets.items()):
            if number and stop and stop.received_on_any_rank(self._device):
                return None
            totals = self._totals(held_out, stop)
            if totals is None:
                return None
            of_all += totals
            losses[name] = mean_loss(*totals.tolist())
        return {VALID_LOSS: mean_loss(*of_all.tolist())} | _by_name(VALID_LOSS, losses)

    def _totals(self, held_out: HeldOutSet, stop: StopRequest | None) -> torch.Tensor | None:
        """Return [summed loss, valid tokens] of a set, of all ranks; None when it was cut short."""
        source = held_out.source
        count = -(-held_out.samples // (source.micro_batch_size * source.replicas))
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
                partial(source.validation, held_out.samples, part, begin),
                part,
                source.micro_batch_size,
                self._heartbeat,
            )
        dist.all_reduce(totals)
        return totals.cpu()

    def final_metrics(self, step: int) -> dict[str, float]:
        """Return the metrics of the last step only: the unigram entropy of the held-out sets."""
        if step < self._steps:
            return {}
        counts = {name: count_targets(each.source.dataset) for name, each in self._sets.items()}
        entropies = {name: entropy(counted) for name, counted in counts.items()}
        return {ENTROPY: entropy(*counts.values())} | _by_name(ENTROPY, entropies)


def _by_name(metric: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return a metric of each set that has a name."""
    return {f"{metric}/{name}": value for name, value in values.items() if name}
