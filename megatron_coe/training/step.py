"""A training step: forward and backward passes by Megatron's schedules, and the update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_coe.checkpoint.state import Progress
from megatron_coe.config.run_config import TrainSettings
from megatron_coe.config.schedules import batch_schedule
from megatron_coe.distributed.train_state import TrainState
from megatron_coe.fault_tolerance.exceptions import NotFiniteError
from megatron_coe.fault_tolerance.heartbeat import STEP, Heartbeat
from megatron_coe.fault_tolerance.nonfinite import diagnose
from megatron_coe.megatron_compat.versions import clear_aux_losses, get_batch_on_this_cp_rank
from megatron_coe.model.documents import packed_seq_params, positions_of_rank
from megatron_coe.training.batch_source import BatchSource
from megatron_coe.training.loss import (
    Batch,
    LossFunction,
    count_valid_tokens,
    loss_scale,
    make_loss_function,
)
from megatron_coe.training.optimizer_step import StepStart, UpdateOutcome, make_optimizer_step
from megatron_coe.training.step_metrics import MetricsCollector, StepMetrics


class TrainStep:
    """One update of the weights, checked before it is applied. A collective of all ranks.

    Args:
        source: the training sequences.
        heartbeat: notes what this rank is doing.
    """

    def __init__(
        self,
        train: TrainSettings,
        train_state: TrainState,
        source: BatchSource,
        heartbeat: Heartbeat,
    ) -> None:
        self._train = train
        self._batch_schedule = batch_schedule(train)
        self._train_state = train_state
        self._source = source
        self._heartbeat = heartbeat
        self._start = StepStart(train_state.chunks)
        self.collector = MetricsCollector(train_state, source)
        self.update = make_optimizer_step(train_state)

    def run(self, progress: Progress, is_logged: bool = False) -> StepMetrics:
        """Make a step; without an update where loss or gradients are not finite.

        Args:
            progress: updated in place.
            is_logged: measure what a record of this step holds.

        Raises:
            NotFiniteError: such a step is not to be skipped; nothing has changed by it.
        """
        started_s = time.perf_counter()
        self._heartbeat.enter(STEP, progress.step + 1)
        self._start.note()
        optimizer, schedule = self._train_state.optimizer, self._train_state.schedule
        assert optimizer is not None and schedule is not None
        batch_size = self._batch_schedule.size(progress.samples)
        count = self._source.num_microbatches(batch_size)
        batches = self._source.training(progress.samples, count)
        with self.collector.watching(is_logged):
            totals = self.compute_gradients(batches)
        lr = get_canonical_lr_for_logging(optimizer.param_groups)
        update = self.update.run(totals)
        skipped = None
        if update.is_finite:
            if self._train_state.average is not None:
                self._train_state.average.update()
            progress.skipped_in_row = 0
        else:
            skipped = self._skip(progress, batches, update)
        progress.step += 1
        progress.samples += batch_size
        schedule.move_to(progress.step, progress.samples)
        if is_logged and self._source.device.type == "cuda":
            torch.cuda.synchronize()  # the update is only launched: it belongs to this step's time
        seconds = time.perf_counter() - started_s
        return StepMetrics(
            update.loss, lr, update.grad_norm, update.grad_norms, seconds, batch_size, skipped
        )

    def compute_gradients(self, batches: list[Batch]) -> torch.Tensor:
        """Compute the gradients of the loss, summed over all ranks; return this rank's totals."""
        optimizer = self._train_state.optimizer
        assert optimizer is not None
        valid_tokens = count_valid_tokens(batches, parallel_state.get_data_parallel_group())
        positions = self._source.sequences_of(len(batches)) * self._train_state.provider.seq_length
        self.update.begin(positions)
        for chunk in self._train_state.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        clear_aux_losses()  # so that metrics are of one step, wherever the run began
        return forward_backward(
            self._train_state,
            lambda: iter(batches),
            len(batches),
            self._source.micro_batch_size,
            self._heartbeat,
            loss_scale(valid_tokens, positions),
        )

    def _skip(self, progress: Progress, batches: list[Batch], update: UpdateOutcome) -> str:
        """Undo what a bad step has changed, and log why; NotFiniteError if it cannot be skipped."""
        self._start.put_back()
        found = diagnose(
            self._train_state.chunks,
            lambda: self.compute_gradients(batches),
            self._source.numbers(progress.samples, len(batches)),
            update.loss,
            update.grad_norm,
        )
        self._start.put_back()
        message = f"step {progress.step + 1} is not finite: {found.text}; nothing was updated"
        if self._train.on_nonfinite == "stop":
            raise NotFiniteError(message, found.weights_are_finite)
        if not found.weights_are_finite or progress.skipped_in_row >= self._train.max_skipped_steps:
            row = f"; {progress.skipped_in_row} steps before it were skipped"
            raise NotFiniteError(message + row, found.weights_are_finite)
        progress.skipped += 1
        progress.skipped_in_row += 1
        return message


def forward_backward(
    train_state: TrainState,
    batches: Callable[[], Iterator[Batch]],
    count: int,
    micro_batch_size: int,
    heartbeat: Heartbeat,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run `count` micro-batches, forward only without a scale. A collective of all ranks.

    Args:
        batches: gives a new iterator over them (each model chunk reads its own).

    Returns:
        [summed loss, valid tokens] of this rank's micro-batches, float64: to be summed over
        all ranks, and 0 where the loss is not computed or another rank computes it too.
    """
    outputs = get_forward_backward_func()(
        forward_step_func=partial(forward_step, scale=torch.zeros(()) if scale is None else scale),
        data_iterator=[_counted(batches(), heartbeat) for _ in train_state.chunks],
        model=train_state.chunks,
        num_microbatches=count,
        seq_length=train_state.provider.seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=scale is None,
    )
    if not outputs or parallel_state.get_tensor_model_parallel_rank() > 0:
        device = next(train_state.chunks[0].parameters()).device
        return torch.zeros(2, dtype=torch.float64, device=device)
    return torch.stack(outputs).sum(dim=0)


def forward_step(
    batches: Iterator[Batch], chunk: torch.nn.Module, scale: torch.Tensor
) -> tuple[torch.Tensor, LossFunction]:
    """Run one micro-batch through one model chunk, as Megatron's schedules call it."""
    batch, packed = share_of_rank(dict(next(batches)))
    output = chunk(
        batch["tokens"],
        batch["position_ids"],
        None,  # causal attention needs no mask: padding stands on the right
        labels=batch["labels"],
        loss_mask=batch["loss_mask"] * scale,  # weights the MTP losses
        packed_seq_params=packed,
    )
    return output, make_loss_function(batch["loss_mask"], scale)


def share_of_rank(batch: Batch) -> tuple[Batch, PackedSeqParams | None]:
    """Return this context-parallel rank's share of a micro-batch, and its documents if packed.

    Args:
        batch: tensors [B, S] by name; of a pack [1, S], with `cu_seqlens` [1, documents + 1], which
            may be filled up with S.
    """
    if "cu_seqlens" not in batch:
        return get_batch_on_this_cp_rank(batch), None
    (filled,) = batch.pop("cu_seqlens").tolist()
    offsets = sorted(set(filled))
    packed = packed_seq_params(offsets, batch["tokens"].device)
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks > 1:
        held = positions_of_rank(offsets, parallel_state.get_context_parallel_rank(), ranks)
        held = held.to(batch["tokens"].device)
        batch = {name: values[:, held] for name, values in batch.items()}
    return batch, packed


def _counted(batches: Iterator[Batch], heartbeat: Heartbeat) -> Iterator[Batch]:
    for batch in batches:
        heartbeat.next_microbatch()
        yield batch
