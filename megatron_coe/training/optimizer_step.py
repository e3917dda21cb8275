"""An update of the weights in two parts, so that loss and gradients are checked in between."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.moe.router import TopKRouter
from torch.nn.utils import clip_grads_with_norm_

from megatron_coe.distributed.seeds import rng_state, set_rng_state


def prepare_update(optimizer: MegatronOptimizer) -> float:
    """Prepare the gradients, and return their global norm before clipping. A collective."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def apply_update(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip the prepared gradients to the configured norm and update. A collective.

    With `prepare_update` it is what `ChainedOptimizer.step` does (megatron/core/optimizer), but for
    the clipping: Megatron's own, without Transformer Engine, takes two passes over the gradients.
    """
    for part in optimizer.chained_optimizers:
        if 0.0 < part.config.clip_grad < grad_norm and (weights := part.get_parameters()):
            # Filled on the device: a number that is copied there makes the host wait.
            total = torch.full((), grad_norm, dtype=torch.float64, device=weights[0].device)
            clip_grads_with_norm_(weights, part.config.clip_grad, total)
    optimizer.step_with_ready_grads()


def agreed_loss(totals: torch.Tensor, grad_norm: float) -> tuple[float, bool]:
    """Return the loss per valid token of the global batch, and whether all values are finite.

    Both are the same on all ranks, and the second counts the gradients of every rank. One
    collective, over three numbers.
    """
    bad = totals.new_full((1,), 0.0 if math.isfinite(grad_norm) else 1.0)
    sums = torch.cat([totals, bad])
    dist.all_reduce(sums)
    loss_sum, tokens, bad_ranks = sums.tolist()
    return mean_loss(loss_sum, tokens), math.isfinite(loss_sum) and bad_ranks == 0


def mean_loss(loss_sum: float, tokens: float) -> float:
    """Return the loss per valid token; 0 without any token."""
    return loss_sum / max(tokens, 1.0)


class StepStart:
    """The state that forward and backward passes change by themselves, to be restored.

    These are the generators and the routers' buffers: Megatron counts tokens there, and updates the
    biases of loss-free balancing before the gradients' norm is known.
    """

    def __init__(self, chunks: Iterable[torch.nn.Module]) -> None:
        routers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, TopKRouter)]
        self._owners = [
            (module, name) for module in routers for name, _ in module.named_buffers(recurse=False)
        ]
        self.note()

    def note(self) -> None:
        self._rng = rng_state()
        self._values = [getattr(module, name).clone() for module, name in self._owners]

    def put_back(self) -> None:
        set_rng_state(self._rng)
        for (module, name), value in zip(self._owners, self._values, strict=True):
            getattr(module, name).copy_(value)
