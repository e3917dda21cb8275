"""Routing statistics of a step: counted per layer and iteration, summed over all ranks.

Axis letters: N routed experts, C iterations, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_coe.model.config import CoEConfig
from megatron_coe.model.moe.router import CoERouter


class RoutingStats:
    """A table on the device that a rank's routers add to inside `counting`.

    Nothing is read back, and nothing sent, before `collect`.

    Args:
        chunks: the rank's part of the model.
    """

    def __init__(
        self, config: CoEConfig, chunks: Iterable[torch.nn.Module], device: torch.device
    ) -> None:
        modules = [module for chunk in chunks for module in chunk.modules()]
        self._routers = [module for module in modules if isinstance(module, CoERouter)]
        layers = config.num_layers + (config.mtp_num_layers or 0)
        shape = (layers, config.coe_iterations, config.num_moe_experts + 1)
        self._table = torch.zeros(shape, dtype=torch.float64, device=device)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is trained inside, from 0."""
        self._table.zero_()
        for router in self._routers:
            router.routing_counts = self._table[router.layer_index]
        try:
            yield
        finally:
            for router in self._routers:
                router.routing_counts = None

    def collect(self) -> Tensor:
        """Sum what was counted last over all ranks. A collective.

        Every token passes a layer's router on one rank alone, whatever splits batch, sequence and
        layers, so the ranks' tables add up.

        Returns:
            [L, C, N + 1], fp64 on the CPU, of layers without routers 0: how many tokens chose each
            expert, and the sum of their top-k probability mass (`CoERouter.count`).
        """
        table = self._table.clone()
        torch.distributed.all_reduce(table)
        return table.cpu()
