"""What an arm holds between its runs, and how much more it needs at the worst moment of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_coe.training.setup import Trainee


@dataclass(frozen=True)
class Footprint:
    """Bytes of tensors."""

    held: int
    """Parameters, gradient buffers and optimizer state: there between two runs."""
    passing: int
    """What a run adds at its highest point: activations, gradients on their way, workspaces."""

    @property
    def peak(self) -> int:
        return self.held + self.passing


def footprint(held: Iterable[Tensor], work: Callable[[], None], device: torch.device) -> Footprint:
    """Of an arm that has run before, so that nothing of its state is still to be made."""
    measure = _peak_on_gpu if device.type == "cuda" else _peak_on_cpu
    return Footprint(storage_bytes(held), measure(work))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}.values())


def held_by(trainee: Trainee) -> Iterable[Tensor]:
    """Every tensor of a model in training."""
    for chunk in trainee.chunks:
        yield from module_tensors(chunk.module)  # `chunk.buffers` are those of the gradients
    for part in getattr(trainee.optimizer, "chained_optimizers", [trainee.optimizer]):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def module_tensors(module: torch.nn.Module) -> Iterable[Tensor]:
    """Parameters with the gradients that Megatron's DDP keeps for them, and buffers."""
    for parameter in module.parameters():
        yield parameter
        if isinstance(gradient := getattr(parameter, "main_grad", None), Tensor):
            yield gradient
    yield from module.buffers()


def _peak_on_gpu(work: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(work: Callable[[], None]) -> int:
    """By the allocations that torch's profiler sees; libraries' own workspaces are not torch's."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    level = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        level += change
        peak = max(peak, level)
    return peak
