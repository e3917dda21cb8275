"""All-to-alls between ranks that run while the rank computes, and the time that they cost it.

An `Exchange` is started and, after whatever does not need its result, finished; going back, the
reverse exchange is started where this one was finished and finished where it was started. Autograd
takes the steps in reverse, so what was computed meanwhile has its backward pass meanwhile, too.
gloo exchanges in threads of its own and NCCL on a stream of its own: the same code serves both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Splits = list[int] | None
"""Rows to or from each rank of the group; None for as many from each."""


@dataclass
class Exposure:
    """How long work stood still for exchanges; filled while `measured_exposure` runs."""

    host_s: float = 0.0
    _on_device: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def seconds(self) -> float:
        """Of the host on a CPU, of the stream on a GPU, which this waits for."""
        if self._on_device:
            torch.cuda.synchronize()
        return self.host_s + sum(a.elapsed_time(b) for a, b in self._on_device) / 1e3

    @contextmanager
    def _counted(self, on_gpu: bool) -> Iterator[None]:
        if on_gpu:
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
            yield
            events[1].record()
            self._on_device.append(events)
        else:
            start = time.perf_counter()
            yield
            self.host_s += time.perf_counter() - start


_measuring: list[Exposure] = []


@contextmanager
def measured_exposure() -> Iterator[Exposure]:
    """Measure what exchanges cost this rank, forward and backward, inside the `with` block."""
    exposure = Exposure()
    _measuring.append(exposure)
    try:
        yield exposure
    finally:
        _measuring.remove(exposure)


class Exchange:
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
        """Begin; what is returned has its rows only once `finish` has been called with it."""
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
        for work, tensor in self._under_way:
            if not _measuring:
                work.wait()
                continue
            with _measuring[-1]._counted(tensor.is_cuda):
                work.wait()
        self._under_way.clear()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, exchange: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange._send(tensors, exchange.received, exchange.sent)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *_: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange._wait()
        gradients, ctx.exchange._returning = ctx.exchange._returning, ()
        return None, *gradients


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, exchange: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        exchange._wait()
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        exchange = ctx.exchange
        exchange._returning = exchange._send(gradients, exchange.sent, exchange.received)
        return None, *gradients  # which nobody reads: `_Start` gives what comes back


def _listed(splits: Splits) -> Splits:
    """As a list: Megatron's dispatcher keeps its splits as arrays."""
    return None if splits is None else [int(rows) for rows in splits]
