"""An exponential moving average of the trained weights, saved beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)

PREFIX = "optimizer.state.ema"
"""Of its tensors' names in a checkpoint, before those of the weights."""


class WeightAverage:
    """a <- decay * a + (1 - decay) * w after each update, in fp32, whole on each rank.

    It begins as the weights that training starts from. Frozen weights have none.

    Args:
        chunks: of the model on this rank.
        decay: share of the average that an update keeps.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], decay: float) -> None:
        self._decay = decay
        self._weights: list[torch.Tensor] = [
            p for chunk in chunks for p in chunk.parameters() if p.requires_grad
        ]
        self._averages = [torch.empty_like(p, dtype=torch.float32) for p in self._weights]
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Set the average to the present weights."""
        torch._foreach_copy_(self._averages, self._weights)

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the weights after a step."""
        weights = [weight.float() for weight in self._weights]
        torch._foreach_lerp_(self._averages, weights, 1 - self._decay)

    @contextmanager
    @torch.no_grad()
    def in_place_of_weights(self) -> Iterator[None]:
        """Have the model compute with the average inside the context."""
        kept = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, kept)

    def sharded_state(self, model_state: ShardedStateDict) -> dict[str, ShardedBase]:
        """Return the average as a checkpoint's tensors, sharded as the weights in `model_state`."""
        sharded = get_param_id_to_sharded_param_map(model_state, self._weights)
        return {
            str(number): make_sharded_optimizer_tensor(weight, self._averages[number], PREFIX)
            for number, weight in sharded.items()
        }

    @torch.no_grad()
    def load(self, loaded: dict[str, torch.Tensor]) -> None:
        """Take the average that a checkpoint held under the names of `sharded_state`."""
        for number, average in loaded.items():
            self._averages[int(number)].copy_(average)
