"""Micro-batches through a rank's model chunks, forward and back, by Megatron's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_coe.distributed.train_state import TrainState
from megatron_coe.fault_tolerance.heartbeat import Heartbeat
from megatron_coe.megatron_compat.versions import get_batch_on_this_cp_rank
from megatron_coe.training.loss import Batch, LossFunction, make_loss_function


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
    reports = get_forward_backward_func()(
        forward_step_func=partial(forward_step, scale=torch.zeros(()) if scale is None else scale),
        data_iterator=[_counted(batches(), heartbeat) for _ in train_state.chunks],
        model=train_state.chunks,
        num_microbatches=count,
        seq_length=train_state.provider.seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=scale is None,
    )
    if not reports or parallel_state.get_tensor_model_parallel_rank() > 0:
        device = next(train_state.chunks[0].parameters()).device
        return torch.zeros(2, dtype=torch.float64, device=device)
    return torch.stack(reports).sum(dim=0)


def forward_step(
    batches: Iterator[Batch], chunk: torch.nn.Module, scale: torch.Tensor
) -> tuple[torch.Tensor, LossFunction]:
    """One micro-batch through one model chunk, as Megatron's schedules call it."""
    batch = get_batch_on_this_cp_rank(dict(next(batches)))
    output = chunk(
        batch["tokens"],
        batch["position_ids"],
        None,  # causal attention needs no mask: padding stands on the right
        labels=batch["labels"],
        loss_mask=batch["loss_mask"] * scale,  # what multi-token prediction weighs its losses by
    )
    return output, make_loss_function(batch["loss_mask"], scale)


def _counted(batches: Iterator[Batch], heartbeat: Heartbeat) -> Iterator[Batch]:
    for batch in batches:
        heartbeat.next_microbatch()
        yield batch
