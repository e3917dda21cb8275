"""The L2 norm of the gradients by parameter group, in one pass over them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

_GROUPS = {
    "embedding": r"embedding\.",
    "head": r"output_layer\.",
    "norms": r"norm\.|layer_norm_(weight|bias)|\b[eh]norm\.",
    "attention": r"\.self_attention\.",
    "routers": r"\.router\.",
    "routed_experts": r"\.experts\.",
    "shared_experts": r"\.shared_experts\.",
    "gates": r"\.coe_weights\.",
    "dense": r"\.mlp\.linear_fc",
    "mtp": r"\beh_proj\.",
}
"""Pattern of the parameter names of a group; the first that matches counts."""

GROUPS = (*_GROUPS, "other")


def group_of(name: str) -> str:
    """Return the group of a parameter, by its name in Megatron's model with any backend."""
    return next((group for group, part in _GROUPS.items() if re.search(part, name)), "other")


class GradientNorms:
    """Measures an optimizer's prepared gradients. Construction is a collective, too.

    Megatron's `get_grad_norm` (megatron/core/optimizer) gives the norm of all; this is the same sum
    of squares over the same tensors, by group.
    """

    def __init__(self, optimizer: MegatronOptimizer, chunks: list[torch.nn.Module]) -> None:
        names = {p: name for chunk in chunks for name, p in chunk.named_parameters()}
        self._device = next(iter(names)).device
        # What the optimizer updates, by its group and by how many ranks hold the very same
        # gradient: each of them contributes its part, so that it counts once.
        self._weights: dict[tuple[int, int], list[torch.Tensor]] = {}
        for part in optimizer.chained_optimizers:
            holders = dist.get_world_size() // part.get_grad_stats_parallel_group().size()
            for parameter, weight in _updated(part, names):
                if param_is_not_shared(weight) and param_is_not_tensor_parallel_duplicate(
                    weight, part.tp_group
                ):
                    place = (GROUPS.index(group_of(names[parameter])), holders)
                    self._weights.setdefault(place, []).append(weight)
        there = torch.zeros(len(GROUPS), device=self._device)
        there[[group for group, _ in self._weights]] = 1
        dist.all_reduce(there, op=dist.ReduceOp.MAX)
        self._groups = there.nonzero().flatten().tolist()

    @torch.no_grad()
    def squares(self) -> torch.Tensor:
        """Return this rank's part of the squared norm of each of `GROUPS`, float64 on the device.

        Summed over all ranks they are those of the whole model, NaN or Inf where a gradient is.
        """
        squares = torch.zeros(len(GROUPS), dtype=torch.float64, device=self._device)
        for (group, holders), weights in self._weights.items():
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            squares[group] += get_total_norm(gradients).double().square() / holders
        return squares

    def named(self, squares: Sequence[float]) -> dict[str, float]:
        """Return the norm of each group in the model from the sum of all ranks' `squares`."""
        return {GROUPS[group]: math.sqrt(squares[group]) for group in self._groups}


def _updated(
    part: MegatronOptimizer, parameters: Iterable[Parameter]
) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Yield the model's parameters that `part` updates, each with its main or sharded weight."""
    if isinstance(part, DistributedOptimizer):  # of each the shard that this rank keeps
        groups = part.optimizer.param_groups
        for parameter, (group, place) in part.model_param_group_index_map.items():
            yield parameter, groups[group]["params"][place]
        return
    own = set(part.get_parameters())
    for parameter in parameters:
        weight = getattr(parameter, "main_param", parameter)
        if weight in own:
            yield parameter, weight
