"""The update of the weights, which changes nothing where loss or gradients are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.moe.router import TopKRouter
from torch.nn.utils import clip_grads_with_norm_

from megatron_coe.distributed.seeds import rng_state, set_rng_state
from megatron_coe.training.grad_norms import GradientNorms

_NORM_EPS = 1e-6
"""Added to a norm before it is clipped, as torch and Megatron do."""


@dataclass(frozen=True)
class UpdateOutcome:
    """What an update was made from, the same on all ranks."""

    loss: float
    """Per valid token of the global batch."""
    grad_norm: float
    """Of all gradients, before clipping."""
    grad_norms: dict[str, float]
    """Of each group of parameters."""

    @property
    def is_finite(self) -> bool:
        """Return whether loss and gradients were; if not, nothing was updated."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class OptimizerStep:
    """Clips gradients to their global norm and updates the weights. Construction is a collective.

    With `MegatronOptimizer.prepare_grads` and `step_with_ready_grads` it is what
    `ChainedOptimizer.step` does (megatron/core/optimizer), with one collective and one host sync.
    Torch's fused AdamW clips and checks on the device, within its one pass over gradients and
    weights (`grad_scale`, `found_inf`, as `torch.amp.GradScaler` uses them): it is launched before
    the host knows the norm, and is at work while the host waits. Other optimizers are called when
    the host has seen that all is finite.
    """

    def __init__(self, optimizer: MegatronOptimizer, chunks: list[torch.nn.Module]) -> None:
        self._optimizer = optimizer
        self._norms = GradientNorms(optimizer, chunks)
        inner = [part.optimizer for part in optimizer.chained_optimizers if part.optimizer]
        self._checks_on_device = all(
            isinstance(adam, torch.optim.AdamW) and adam.defaults["fused"] for adam in inner
        )

    @torch.no_grad()
    def run(self, totals: torch.Tensor) -> UpdateOutcome:
        """Update the weights if loss and gradients of all ranks are finite. A collective.

        Args:
            totals: [summed loss, valid tokens] of this rank, float64.
        """
        self._optimizer.prepare_grads()
        sums = torch.cat([totals, self._norms.squares()])
        dist.all_reduce(sums)
        copy = HostCopy(sums)
        norm = sums[2:].sum().sqrt()
        if self._checks_on_device:
            self._launch(norm, sums.isfinite().all())
        outcome = self._outcome(*copy.values())
        if outcome.is_finite and not self._checks_on_device:
            self._clip(norm, outcome.grad_norm)
            self._optimizer.step_with_ready_grads()
        return outcome

    def _launch(self, norm: torch.Tensor, is_finite: torch.Tensor) -> None:
        """Launch an update that the device makes only if `is_finite`."""
        parts = [part for part in self._optimizer.chained_optimizers if part.optimizer]
        for part in parts:
            adam: Any = part.optimizer
            adam.found_inf = is_finite.logical_not().float()
            if part.config.clip_grad > 0.0:
                excess = (norm + _NORM_EPS) / part.config.clip_grad
                adam.grad_scale = excess.clamp(min=1.0).float()
        try:
            self._optimizer.step_with_ready_grads()
        finally:
            for part in parts:
                part.optimizer.found_inf = part.optimizer.grad_scale = None

    def _clip(self, norm: torch.Tensor, grad_norm: float) -> None:
        for part in self._optimizer.chained_optimizers:
            if 0.0 < part.config.clip_grad < grad_norm and (weights := part.get_parameters()):
                clip_grads_with_norm_(weights, part.config.clip_grad, norm)

    def _outcome(self, loss_sum: float, tokens: float, *squares: float) -> UpdateOutcome:
        return UpdateOutcome(
            mean_loss(loss_sum, tokens), math.sqrt(sum(squares)), self._norms.named(squares)
        )


class HostCopy:
    """A copy of a small tensor on its way to the host, started at construction."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived = None
        if tensor.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> list[float]:
        """Wait for the copy, not for what was launched after it, and return the numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()


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
