"""The optimizer's part of a checkpoint: tensors named after their weights.

    optimizer.state.exp_avg.<weight>        Adam's moments, shaped and sharded as the weight
    optimizer.state.exp_avg_sq.<weight>
    optimizer.state.momentum_buffer.<weight>  Muon's momentum, instead of these
    optimizer.state.fp32_param.<weight>     the fp32 masters of 16-bit weights

Nothing else is saved: hyperparameters come from the settings, the step count from the run. What
Megatron would add (megatron/core/optimizer, `sharded_state_dict`) depends on the kind of optimizer
and on the layout: a pipeline stage without experts has one optimizer, another two. Without it,
either kind of optimizer reads what the other has saved, from any layout into any other.
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

from megatron_coe.distributed.muon import Muon
from megatron_coe.distributed.train_state import complete_state

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}
# The distributed optimizer has another name for the fp32 masters, and saves them even where they
# are the model's weights.
_DISTRIBUTED_MASTER, _MASTER = "optimizer.state.param.", "optimizer.state.fp32_param."
_HYPERPARAMETERS = ("max_lr", "min_lr", "betas", "eps", "lr_mult")


@dataclass(frozen=True)
class _Slot:
    """A placeholder in Megatron's nested state for a tensor of the checkpoint."""

    name: str


class OptimizerState:
    """The tensors of an optimizer in a checkpoint, and how they are restored.

    A collective of all ranks: the distributed optimizer gathers its shards.

    Args:
        optimizer: saved or restored.
        model_state: the sharded states of the rank's model chunks.
        is_loading: the tensors are to be read, and their present values mean nothing.
    """

    def __init__(
        self, optimizer: MegatronOptimizer, model_state: ShardedStateDict, is_loading: bool = False
    ) -> None:
        self.optimizer = optimizer
        self.tensors: dict[str, ShardedBase] = {}
        """To be saved or loaded; the names are private to this object."""
        # 16-bit weights have masters; all chained optimizers have the same `bf16`.
        self._has_masters = optimizer.chained_optimizers[0].config.bf16
        self._state: dict[Any, Any] = optimizer.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=_METADATA
        )
        dict_list_map_inplace(self._take, self._state)

    def restore(self, loaded: dict[str, torch.Tensor], step: int) -> None:
        """Put the loaded tensors into the optimizer, as after `step` updates.

        The model's weights must be loaded already. Hyperparameters stay those of the settings.

        Args:
            loaded: by the names of `tensors`.
            step: updates of the weights so far.
        """
        dict_list_map_inplace(
            lambda value: loaded[value.name] if isinstance(value, _Slot) else value, self._state
        )
        for part, state in self._parts():
            adam = state.get("optimizer", state)
            counts = isinstance(part.optimizer, torch.optim.Optimizer)
            if "state" in adam and counts and not isinstance(part.optimizer, Muon):
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
        """Move a tensor of the state to `tensors`, and return its placeholder."""
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
    """Set the count of updates, which Adam's bias correction uses, to `step`."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            if not isinstance(part.optimizer, torch.optim.Optimizer) or "step" in group:
                group["step"] = step  # Transformer Engine and Apex count per group
            for parameter in group["params"]:
                state = part.optimizer.state.get(parameter, {})
                if torch.is_tensor(state.get("step")):
                    state["step"].fill_(step)
