"""The auxiliary losses of a step, per layer and iteration, gathered from all ranks.

Routers leave their losses in Megatron's own log (`megatron_coe.megatron_compat.versions`): the
sum over iterations under Megatron's own name, and each iteration's under a name of its own.

Axis letters: C iterations, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_coe.megatron_compat.versions import (
    clear_aux_losses,
    recorded_aux_losses,
)
from megatron_coe.model.config import CoEConfig

TRACKER_NAMES = {
    "seq_aux_loss": "seq_load_balancing_loss",
    "aux_loss": "load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
    "z_loss": "z_loss",
}
"""Megatron's tracker name of each `moe_router_load_balancing_type`, and of the z-loss."""


def iteration_key(name: str, iteration: int) -> str:
    """Return the tracker name of one iteration's part of loss `name`; `iteration` counts from 0."""
    return f"{name}_iteration_{iteration + 1}"


def collect_aux_losses(
    config: CoEConfig, num_microbatches: int, device: torch.device
) -> dict[str, Tensor]:
    """Return the mean auxiliary losses since the last call, and clear them.

    A collective: every rank of the model calls it, also one without CoE layers. Megatron's own
    reduction walks the keys a rank happens to have and hangs when two ranks' differ.

    Args:
        num_microbatches: micro-batches per rank since the last call, over which the mean is taken.
        device: where a rank that logged nothing makes its zeros.

    Returns:
        For each configured loss (`seq_aux_loss`, ..., `z_loss`) its value without coefficient
        [C, L], fp32 on the CPU; 1 is perfect balance but for the z-loss, dense layers have 0.
    """
    losses = list(_configured_losses(config))
    recorded = recorded_aux_losses()
    num_layers = config.num_layers + (config.mtp_num_layers or 0)
    values = torch.zeros(len(losses), config.coe_iterations, num_layers, device=device)
    for row, loss in enumerate(losses):
        for t in range(config.coe_iterations):
            key = iteration_key(TRACKER_NAMES[loss], t)
            if key in recorded:
                values[row, t] = recorded[key]
    clear_aux_losses()
    torch.distributed.all_reduce(
        values, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    )
    torch.distributed.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
    dp_size = parallel_state.get_data_parallel_world_size()
    return {
        # Ranks hold shares of a loss; only the global one is sharded over data parallelism too.
        loss: rows.cpu() / (num_microbatches * (1 if loss == "global_aux_loss" else dp_size))
        for loss, rows in zip(losses, values, strict=True)
    }


def _configured_losses(config: CoEConfig) -> Iterator[str]:
    kinds = config.moe_router_load_balancing_type
    yield from (kind for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind != "none")
    if config.moe_z_loss_coeff is not None:
        yield "z_loss"
