"""Muon for matrices, beside Megatron's AdamW for all other weights.

The momentum of each matrix is orthogonalized by a Newton-Schulz iteration (Jordan et al., "Muon",
2024) and scaled so that AdamW's learning rate and weight decay fit (Liu et al., arXiv 2502.16982).
Megatron's own Muon (`megatron.core.optimizer`, with the package emerging-optimizers) takes a
parameter for one matrix: here one holds all experts of a rank, or gate over up.

Under tensor parallelism every rank gathers and orthogonalizes whole matrices, Megatron's mode
`duplicated`. The momentum is sharded, saved and resharded as its weight is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    _get_param_groups,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Parameter

from megatron_coe.config.run_config import TrainSettings
from megatron_coe.hf.weight_names import Weight
from megatron_coe.model.matrices import matrix_parameters

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of X <- a X + (b X X^T + c (X X^T)^2) X."""

_SMALLEST_NORM = 1e-7
"""A momentum of zero stays zero."""


@torch.no_grad()
def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """Bring the singular values of matrices [..., rows, columns] near 1.

    It is computed in bf16 on a GPU, in the matrices' own dtype on a CPU.
    """
    dtype, (a, b, c) = x.dtype, COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_SMALLEST_NORM)
    x = x.to(torch.bfloat16) if x.is_cuda else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if is_tall else x).to(dtype)


@dataclass(frozen=True)
class Matrices:
    """How this rank's part of a weight is made of matrices."""

    weight: Weight
    group: dist.ProcessGroup
    """The ranks that share each matrix."""

    @classmethod
    def of(cls, weight: Weight) -> Matrices:
        if weight.experts:
            return cls(weight, parallel_state.get_expert_tensor_parallel_group())
        return cls(weight, parallel_state.get_tensor_model_parallel_group())

    def orthogonalized(self, update: Tensor, steps: int) -> Tensor:
        """Return an update with each matrix orthogonalized, times the root of its longer side.

        Args:
            update: of the weight's shape on this rank; of a single expert where the module has a
                parameter for each.
        """
        is_one_expert = self.weight.experts > 0 and update.dim() == 2
        parts = list(self.weight.split(update[None] if is_one_expert else update))
        shapes = cycle(self.weight.parts.values())
        alike: dict[tuple[torch.Size, tuple[int, ...]], list[int]] = {}
        for number, (part, shape) in enumerate(zip(parts, shapes, strict=False)):
            alike.setdefault((part.shape, shape), []).append(number)
        for (_, shape), numbers in alike.items():
            stacked = torch.stack([parts[number] for number in numbers])
            whole = self._gathered(stacked, shape)
            own = self._own(newton_schulz(whole, steps) * max(shape) ** 0.5, stacked)
            for number, part in zip(numbers, own, strict=True):
                parts[number] = part
        joined = self.weight.join(parts)
        return joined[0] if is_one_expert else joined

    def _gathered(self, shards: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return whole matrices [n, rows, columns] from this rank's shards of them."""
        axis = _sharded_axis(shards, (len(shards), *shape))
        if axis is None:
            return shards
        every = [torch.empty_like(shards) for _ in range(self.group.size())]
        dist.all_gather(every, shards.contiguous(), group=self.group)
        return torch.cat(every, axis)

    def _own(self, whole: Tensor, shards: Tensor) -> Tensor:
        """Return this rank's shards, shaped as `shards`, of whole matrices."""
        axis = _sharded_axis(shards, tuple(whole.shape))
        if axis is None:
            return whole
        return whole.chunk(self.group.size(), axis)[self.group.rank()]


def _sharded_axis(shards: Tensor, whole: tuple[int, ...]) -> int | None:
    return next((i for i, size in enumerate(whole) if shards.shape[i] != size), None)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum m and decoupled weight decay, for weights made of matrices.

    m <- beta m + (1 - beta) g;  w <- (1 - lr decay) w - lr scale O((1 - beta) g + beta m)

    O orthogonalizes each matrix and multiplies it by the root of its longer side.

    Args:
        groups: parameter groups of Megatron's.
        momentum: beta.
        steps: of the Newton-Schulz iteration.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        weight_decay: float,
        momentum: float,
        steps: int,
        scale: float,
    ) -> None:
        settings = {"momentum": momentum, "steps": steps, "scale": scale}
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, **settings})
        self.matrices: dict[Tensor, Matrices] = {}
        """Of each weight in the groups; Megatron puts fp32 masters in place of 16-bit ones."""

    def complete_state(self) -> None:
        """Give each weight its momentum: Megatron saves and loads only a state that is there."""
        for group in self.param_groups:
            for weight in group["params"]:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights that have a gradient. A collective of each tensor-parallel group."""
        for group in self.param_groups:
            beta, rate = group["momentum"], group["lr"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight]["momentum_buffer"]
                momentum.lerp_(weight.grad, 1 - beta)
                update = weight.grad.lerp(momentum, beta)
                update = self.matrices[weight].orthogonalized(update, group["steps"])
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update, alpha=-rate * group["scale"])


def get_muon_optimizer(
    config: OptimizerConfig,
    chunks: list[DistributedDataParallel],
    overrides: Mapping[ParamKey, Any],
    train: TrainSettings,
) -> MegatronOptimizer:
    """Build Muon for the matrices of the model's chunks and AdamW for their other weights."""
    matrices = {
        parameter: weight
        for model in unwrap_model(chunks)
        for parameter, weight in matrix_parameters(model, model.config).items()
    }
    trained = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
    with _frozen([p for p in trained if p not in matrices]):
        groups = _get_param_groups(chunks, config, dict(overrides))
    parts = []
    for is_expert in (False, True):
        own = [group for group in groups if group["is_expert_parallel"] is is_expert]
        if own:
            muon = Muon(
                own,
                train.lr,
                train.weight_decay,
                train.muon_momentum,
                train.muon_num_ns_steps,
                train.muon_extra_scale_factor,
            )
            parts.append(_wrapped(muon, config, is_expert))
            for parameter in (p for p, w in matrices.items() if bool(w.experts) is is_expert):
                weight = getattr(parameter, "main_param", parameter)
                muon.matrices[weight] = Matrices.of(matrices[parameter])
            muon.complete_state()
    with _frozen(list(matrices)):
        adam = get_megatron_optimizer(config, chunks, config_overrides=dict(overrides))
    return ChainedOptimizer([*parts, *adam.chained_optimizers])


def _wrapped(muon: Muon, config: OptimizerConfig, is_expert: bool) -> MegatronOptimizer:
    """Return Megatron's optimizer around one of torch, as `get_megatron_optimizer` builds it."""

    def complete(optimizer: Muon, _: OptimizerConfig | None = None) -> None:
        optimizer.complete_state()

    part: Any
    if config.bf16:
        part = Float16OptimizerWithFloat16Params(muon, config, None, complete)
    else:
        part = FP32Optimizer(muon, config, complete)
    if is_expert:
        group = parallel_state.get_expert_tensor_model_pipeline_parallel_group()
    else:
        group = parallel_state.get_model_parallel_group()
    part.grad_stats_parallel_group = group
    part.tp_group = parallel_state.get_tensor_model_parallel_group()
    part.expert_tp_group = parallel_state.get_expert_tensor_parallel_group()
    return part


@contextmanager
def _frozen(parameters: list[Parameter]) -> Iterator[None]:
    """Hide parameters from Megatron, which makes groups of what requires a gradient."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
