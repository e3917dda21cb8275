"""All-to-alls between ranks that run while the rank computes.

An `AllToAll` is started and, after whatever does not need its result, finished; in the backward
pass the reverse one is started where this one was finished and finished where it was started.
Autograd runs in reverse, so what was overlapped in the forward pass is overlapped in the backward
pass, too. gloo communicates in threads of its own and NCCL on a stream of its own: the same code
serves both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Splits = list[int] | None
"""Rows to or from each rank of the group; None for as many from each."""


class AllToAll:
    """One all-to-all of the rows of some tensors, and the reverse one of their gradients.

    Args:
        received, sent: rows from and to each rank of the group.
    """

    def __init__(self, group: dist.ProcessGroup, received: Splits, sent: Splits) -> None:
        self.group = group
        self.received, self.sent = _listed(received), _listed(sent)
        self._under_way: list[tuple[dist.Work, Tensor]] = []
        self._returning: tuple[Tensor, ...] = ()

    def start(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Start; the returned tensors are filled only once `finish` has been called with them."""
        return _Start.apply(self, *tensors)

    def finish(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Wait for the rows of what `start` returned."""
        return _Finish.apply(self, *tensors)

    def _send(
        self, tensors: tuple[Tensor, ...], received: Splits, sent: Splits
    ) -> tuple[Tensor, ...]:
        arriving = []
        for tensor in tensors:
            tensor = tensor.contiguous()
            rows = len(tensor) if received is None else sum(received)
            result = tensor.new_empty(rows, *tensor.shape[1:])
            work = dist.all_to_all_single(
                result, tensor, received, sent, group=self.group, async_op=True
            )
            self._under_way.append((work, tensor))  # which must live as long as it is read
            arriving.append(result)
        return tuple(arriving)

    def _wait(self) -> None:
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, all_to_all: AllToAll, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.all_to_all = all_to_all
        return all_to_all._send(tensors, all_to_all.received, all_to_all.sent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        ctx.all_to_all._wait()
        gradients, ctx.all_to_all._returning = ctx.all_to_all._returning, ()
        return None, *gradients


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, all_to_all: AllToAll, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.all_to_all = all_to_all
        all_to_all._wait()
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        all_to_all = ctx.all_to_all
        all_to_all._returning = all_to_all._send(gradients, all_to_all.sent, all_to_all.received)
        return None, *gradients  # which nobody reads: `_Start` gives what comes back


def _listed(splits: Splits) -> Splits:
    """As a list: Megatron's dispatcher keeps its splits as arrays."""
    return None if splits is None else [int(rows) for rows in splits]
