"""The update of the weights, which changes nothing where loss or gradients are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.moe.router import TopKRouter
from torch.nn.utils import clip_grads_with_norm_

from megatron_coe.distributed.seeds import rng_state, set_rng_state
from megatron_coe.distributed.train_state import TrainState
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
        return all(map(math.isfinite, (self.loss, self.grad_norm, *self.grad_norms.values())))


def make_optimizer_step(train_state: TrainState) -> OptimizerStep:
    """Make the update for the model's device. A collective.

    Reading a number from a GPU costs a wait. On a CPU it is free, and Megatron's own order of
    operations lets runs of earlier versions resume to the last bit.
    """
    if next(train_state.chunks[0].parameters()).is_cuda:
        return OneSyncOptimizerStep(train_state)
    return OptimizerStep(train_state)


class OptimizerStep:
    """Updates the weights as Megatron does, if all is finite. Construction is a collective.

    It is `ChainedOptimizer.step` (megatron/core/optimizer) but for clipping, for which Megatron's
    own, without Transformer Engine, takes two passes over the gradients.
    """

    def __init__(self, train_state: TrainState) -> None:
        assert train_state.optimizer is not None
        self._optimizer = train_state.optimizer
        self._norms = GradientNorms(self._optimizer, train_state.chunks)

    def begin(self, positions: int) -> None:
        """Prepare for the gradients of a global batch, before its first backward pass.

        Nothing is to be done where Megatron divides them, once finished, by what it has counted.

        Args:
            positions: P (`megatron_coe.training.loss`).
        """

    @torch.no_grad()
    def run(self, totals: torch.Tensor) -> UpdateOutcome:
        """Update the weights if loss and gradients of all ranks are finite. A collective.

        Args:
            totals: [summed loss, valid tokens] of this rank, float64.
        """
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        loss_sum, tokens, *squares = self._sums(totals).tolist()
        outcome = UpdateOutcome(mean_loss(loss_sum, tokens), grad_norm, self._norms.named(squares))
        if outcome.is_finite:
            self._clip_and_step(grad_norm)
        return outcome

    def _sums(self, totals: torch.Tensor) -> torch.Tensor:
        """Return `totals` and the squared norms of all groups, summed over all ranks."""
        sums = torch.cat([totals, self._norms.squares()])
        dist.all_reduce(sums)
        return sums

    def _clip_and_step(self, grad_norm: float) -> None:
        for part in self._optimizer.chained_optimizers:
            if 0.0 < part.config.clip_grad < grad_norm and (weights := part.get_parameters()):
                # Filled on the device: a number that is copied there makes the host wait.
                total = torch.full((), grad_norm, dtype=torch.float64, device=weights[0].device)
                clip_grads_with_norm_(weights, part.config.clip_grad, total)
        self._optimizer.step_with_ready_grads()


class OneSyncOptimizerStep(OptimizerStep):
    """The same update with one collective and one host sync, and fewer passes over memory.

    The backward pass starts from 1 / P: Megatron divides the finished gradients instead, a pass
    over all of them, for which the host waits to see that P is not 0.

    Torch's fused AdamW clips and checks on the device, within its one pass over gradients and
    weights (`grad_scale`, `found_inf`, as `torch.amp.GradScaler` uses them): it is launched before
    the host knows the norm, and is at work while the host waits. Other optimizers are called when
    the host has seen that all is finite.
    """

    def __init__(self, train_state: TrainState) -> None:
        super().__init__(train_state)
        self._config = train_state.provider
        self._config.finalize_model_grads_func = _finalize_undivided
        inner = [part.optimizer for part in self._optimizer.chained_optimizers if part.optimizer]
        self._checks_on_device = all(
            isinstance(adam, torch.optim.AdamW) and adam.defaults["fused"] for adam in inner
        )

    def begin(self, positions: int) -> None:
        self._config.grad_scale_func = lambda loss: loss / positions

    @torch.no_grad()
    def run(self, totals: torch.Tensor) -> UpdateOutcome:
        self._optimizer.prepare_grads()
        sums = self._sums(totals)
        copy = HostCopy(sums)
        if self._checks_on_device:
            self._launch(sums[2:].sum().sqrt(), sums.isfinite().all())
        loss_sum, tokens, *squares = copy.values()
        grad_norm = math.sqrt(sum(squares))
        outcome = UpdateOutcome(mean_loss(loss_sum, tokens), grad_norm, self._norms.named(squares))
        if outcome.is_finite and not self._checks_on_device:
            self._clip_and_step(grad_norm)
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


def _finalize_undivided(
    model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **options: Any
) -> None:
    """Reduce gradients as Megatron does, but leave them undivided."""
    finalize_model_grads(model, None, **options)


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
