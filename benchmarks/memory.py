"""Memory of a variant: held between its runs, and the peak of one beyond that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.timing import Lap
from megatron_coe.distributed.train_state import TrainState


@dataclass(frozen=True)
class Footprint:
    """Bytes of tensors."""

    held: int
    """Parameters, gradient buffers and optimizer state."""
    passing: dict[str, int]
    """The peak of each part of a run beyond `held`: activations, temporary gradients,
    workspaces."""

    @property
    def peak(self) -> int:
        """The most bytes allocated at a time."""
        return self.held + max(self.passing.values())


def footprint(
    held: Iterable[Tensor], run: Callable[[Lap], None], device: torch.device
) -> Footprint:
    """Measure a variant that has run before, so that its state is allocated.

    Args:
        held: tensors that live between two runs.
        run: the variant's.
        device: its device.
    """
    measure = _peaks_on_gpu if device.type == "cuda" else _peaks_on_cpu
    return Footprint(storage_bytes(held), measure(run))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum the bytes of the storages behind the tensors, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}.values())


def held_by(train_state: TrainState) -> Iterable[Tensor]:
    """Yield every tensor of a model in training."""
    for chunk in train_state.chunks:
        yield from module_tensors(chunk.module)  # `chunk.buffers` are those of the gradients
    for part in getattr(train_state.optimizer, "chained_optimizers", [train_state.optimizer]):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def module_tensors(module: torch.nn.Module) -> Iterable[Tensor]:
    """Yield parameters, the gradients that Megatron's DDP keeps for them, and buffers."""
    for parameter in module.parameters():
        yield parameter
        if isinstance(gradient := getattr(parameter, "main_grad", None), Tensor):
            yield gradient
    yield from module.buffers()


def _peaks_on_gpu(run: Callable[[Lap], None]) -> dict[str, int]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    peaks: dict[str, int] = {}

    def lap(part: str) -> None:
        torch.cuda.synchronize()
        peaks[part] = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()

    run(lap)
    return peaks


def _peaks_on_cpu(run: Callable[[Lap], None]) -> dict[str, int]:
    """Measure by the allocations that torch's profiler sees; other libraries' are not included."""

    def lap(part: str) -> None:
        with record_function(_LAP + part):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(lap)
    peaks: dict[str, int] = {}
    level = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
        elif event.name().startswith(_LAP):
            peaks[event.name().removeprefix(_LAP)] = peak
            peak = level
    return peaks


_LAP = "end of "
