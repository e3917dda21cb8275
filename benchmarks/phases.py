"""Time by phase, forward and backward, by torch's profiler, on CPU and GPU.

Calls of the model's parts are marked by ranges. An operation within a range belongs to its phase; a
node of the backward pass belongs to the phase of the operation that created it, which the profiler
identifies by a sequence number. So phases need no synchronization between them, and a phase's time
is that of its operations: of the processor on a CPU, of the kernels on a GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

PREFIX = "phase:"
OTHER = "other"
GRADIENT_BUFFERS = "gradient buffers"

Target = tuple[object, str, str]
"""An object, the name of its method and the phase that the method belongs to."""

Phases = dict[str, tuple[float, float]]
"""Seconds of each phase in the forward pass (and optimizer step) and in the backward pass."""


def targets(model: torch.nn.Module) -> Iterator[Target]:
    """Yield the calls of a model that are phases, by Megatron's names for the parts."""
    for name, module in model.named_modules():
        part = name.rpartition(".")[2]
        if isinstance(module, MoELayer):
            yield module, "forward", "iterations and residual"
            yield from _layer_targets(module)
        elif part == "self_attention":
            yield module, "forward", "attention"
        elif part in ("input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            yield module, "forward", "norms"
        elif part == "embedding":
            yield module, "forward", "embedding"
        if hasattr(module, "_postprocess"):  # GPTModel: output layer and loss
            yield module, "_postprocess", "head"


def _layer_targets(layer: MoELayer) -> Iterator[Target]:
    yield layer, "route", "route"
    yield layer.experts, "forward", "experts"
    if layer.shared_experts is not None:
        yield layer.shared_experts, "forward", "shared"
    for method in ("dispatch_preprocess", "token_dispatch", "dispatch_postprocess"):
        yield layer.token_dispatcher, method, "permute"
    for method in ("combine_preprocess", "token_combine", "combine_postprocess"):
        yield layer.token_dispatcher, method, "combine"


@contextmanager
def marked(calls: Iterable[Target]) -> Iterator[None]:
    """Run these objects' methods within ranges, and restore them afterwards."""
    with ExitStack() as stack:
        for owner, name, phase in calls:
            method = getattr(owner, name, None)
            if method is None:
                continue
            if name in vars(owner):
                stack.callback(setattr, owner, name, method)
            else:
                stack.callback(delattr, owner, name)
            setattr(owner, name, _within(PREFIX + phase, method))
        yield


def _within(label: str, method: Callable) -> Callable:
    @wraps(method)
    def ranged(*args: object, **kwargs: object) -> object:
        with record_function(label):
            return method(*args, **kwargs)

    return ranged


def measure_phases(
    work: Callable[[], object], calls: Sequence[Target], device: torch.device
) -> Phases:
    """Measure the seconds that `work` spends in each phase.

    Args:
        work: to profile.
        calls: the phases.
        device: that it runs on.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        marked(calls),
        profile(activities=activities) as profiled,
        record_function(PREFIX + OTHER),
    ):
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return attribute(profiled.events(), on_gpu=device.type == "cuda")


def smallest(profiles: Sequence[Phases]) -> Phases:
    """Return the smallest times of each phase over several runs, the least disturbed ones."""
    return {
        phase: (
            min(found.get(phase, (0.0, 0.0))[0] for found in profiles),
            min(found.get(phase, (0.0, 0.0))[1] for found in profiles),
        )
        for phase in largest_first(profiles)
    }


def largest_first(profiles: Iterable[Phases]) -> list[str]:
    """Return all phases, sorted by their largest time in any profile."""
    most: dict[str, float] = {}
    for found in profiles:
        for phase, times in found.items():
            most[phase] = max(most.get(phase, 0.0), sum(times))
    return sorted(most, key=most.__getitem__, reverse=True)


def attribute(events: EventList, on_gpu: bool) -> Phases:
    """Sum the events' own times by phase and direction."""
    maker = _makers(events)
    seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        if event.is_async or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        own_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own_us:
            phase, backward = _phase_of(event, maker)
            seconds[phase][backward] += own_us / 1e6
    return {phase: (forward, back) for phase, (forward, back) in seconds.items()}


def _makers(events: EventList) -> dict[int, str]:
    """Return the phase in which each sequence number was issued."""
    makers: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and _node_of(event) is None:
            makers.setdefault(event.sequence_nr, _range_of(event) or OTHER)
    return makers


def _phase_of(event: FunctionEvent, makers: dict[int, str]) -> tuple[str, bool]:
    node = _node_of(event)
    if node is None:
        return _range_of(event) or OTHER, False
    if "AccumulateGrad" in node.name:
        return GRADIENT_BUFFERS, True
    # An operation recomputed in the backward pass is in a range of its own, below the node.
    return _range_of(event, below=node) or makers.get(node.sequence_nr, OTHER), True


def _node_of(event: FunctionEvent | None) -> FunctionEvent | None:
    """Return the node of the backward pass that an event belongs to, if any."""
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return event
        event = event.cpu_parent
    return None


def _range_of(event: FunctionEvent | None, below: FunctionEvent | None = None) -> str | None:
    """Return the phase of the innermost range around an event, below that ancestor."""
    while event is not None and event is not below:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        event = event.cpu_parent
    return None
