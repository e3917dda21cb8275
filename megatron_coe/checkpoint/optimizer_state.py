"""The optimizer's part of a checkpoint: tensors named after the weights they belong to.

    optimizer.state.exp_avg.<weight>        Adam's moments, of the weight's shape and cut as it is
    optimizer.state.exp_avg_sq.<weight>
    optimizer.state.fp32_param.<weight>     for 16-bit weights: what is updated in their place

Nothing else is kept: hyperparameters are those of the settings, and the step count is the run's.
What Megatron would add to the checkpoint (megatron/core/optimizer, `sharded_state_dict`) depends on
the kind of optimizer and on the layout: a pipeline stage without experts has one optimizer, another
two. Without it, what either kind saved in any layout is read by the other in any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedStateDict,
)
from megatron.core.optimizer import MegatronOptimizer

from megatron_coe.distributed.train_state import complete_state

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}
# The distributed optimizer has a name of its own for the fp32 weights, and saves them also where
# they are the model's own.
_DISTRIBUTED_MASTER, _MASTER = "optimizer.state.param.", "optimizer.state.fp32_param."
_HYPERPARAMETERS = ("max_lr", "min_lr", "betas", "eps", "lr_mult")


@dataclass(frozen=True)
class _Slot:
    """Stands in Megatron's nested state where a tensor of the checkpoint belongs."""

    name: str


class OptimizerState:
    """What `optimizer` keeps in a checkpoint, and how it comes back.

    Args:
        model_state: the sharded states of the rank's model chunks.
        is_loading: the tensors are to be read (their values are then meaningless), not written.

    A collective of all ranks, as the distributed optimizer gathers its shards to be saved.
    """

    def __init__(
        self, optimizer: MegatronOptimizer, model_state: ShardedStateDict, is_loading: bool = False
    ) -> None:
        self.optimizer = optimizer
        self.tensors: dict[str, ShardedBase] = {}
        """To be saved or loaded, under names that mean something to this object only."""
        # 16-bit weights have masters. (`bf16` is that of every optimizer of the chain.)
        self._has_masters = optimizer.chained_optimizers[0].config.bf16
        self._state: dict[Any, Any] = optimizer.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=_METADATA
        )
        dict_list_map_inplace(self._take, self._state)

    def restore(self, loaded: dict[str, torch.Tensor], step: int) -> None:
        """Give the optimizer the loaded `tensors`, as after `step` updates of the loaded model.

        The model has its weights already. Hyperparameters stay those of the present settings.
        """
        dict_list_map_inplace(
            lambda value: loaded[value.name] if isinstance(value, _Slot) else value, self._state
        )
        for part, state in self._parts():
            adam = state.get("optimizer", state)
            if "state" in adam and isinstance(part.optimizer, torch.optim.Optimizer):
                adam["state"]["common_step"] = torch.tensor(float(step))
            if "param_state" in state and not self._has_masters:
                weights = [weight for buffer in part.buffers for weight in buffer.param_index_map]
                for index, weight in enumerate(weights):
                    state["param_state"][index]["param"] = weight.detach()
        groups = self.optimizer.param_groups
        present = [{name: g[name] for name in _HYPERPARAMETERS if name in g} for g in groups]
        self.optimizer.load_state_dict(self._state)
        for group, values in zip(self.optimizer.param_groups, present, strict=True):
            group.update(values)
        complete_state(self.optimizer)
        set_step(self.optimizer, step)

    def _take(self, value: object) -> object:
        """Move a tensor of the state to `tensors` and leave its slot."""
        if isinstance(value, LocalNonpersistentObject):
            return value.unwrap()
        if not isinstance(value, ShardedBase):
            return value
        if value.key.startswith(_DISTRIBUTED_MASTER):
            if not self._has_masters:
                return value
            value = replace(value, key=value.key.replace(_DISTRIBUTED_MASTER, _MASTER, 1))
        slot = _Slot(str(len(self.tensors)))
        self.tensors[slot.name] = value
        return slot

    def _parts(self) -> Iterator[tuple[MegatronOptimizer, dict[str, Any]]]:
        parts = self.optimizer.chained_optimizers
        states = [self._state] if len(parts) == 1 else [self._state[i] for i in range(len(parts))]
        return zip(parts, states, strict=True)


def set_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Make the next update number `step` + 1, as Adam's bias correction counts them."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            if not isinstance(part.optimizer, torch.optim.Optimizer) or "step" in group:
                group["step"] = step  # Transformer Engine and Apex count per group
            for parameter in group["params"]:
                state = part.optimizer.state.get(parameter, {})
                if torch.is_tensor(state.get("step")):
                    state["step"].fill_(step)
