"""What is said of a step whose loss or gradients are NaN or Inf.

Of all ranks' findings (`megatron_coe.fault_tolerance.nonfinite_tracer`) the earliest is reported:
what is not finite on one rank is soon so on those that it talks to.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from megatron_coe.fault_tolerance.nonfinite_tracer import (
    BACKWARD,
    FORWARD,
    PARAMETER,
    NonFiniteTracer,
    Place,
    is_finite,
)

_WHERE = {
    FORWARD: "in the forward pass, in what {} gives",
    BACKWARD: "in the backward pass through {}",
    PARAMETER: "in the gradient of {}",
}
_MOST_NAMES = 8


@dataclass(frozen=True)
class Explanation:
    """The same on every rank."""

    text: str
    weights_are_finite: bool
    """Whether the weights were before the step: no skipping helps where they were not."""


@dataclass(frozen=True)
class _Findings:
    """Of one rank; sent to all."""

    key: tuple[int, ...]
    """Smaller is earlier, over all ranks."""
    text: str
    bad_weights: list[str]
    bad_gradients: list[str]


def explain(
    chunks: list[torch.nn.Module],
    repeat: Callable[[], object],
    sequences: list[range],
    loss: float,
    grad_norm: float,
) -> Explanation:
    """Run a step again to learn where it went wrong. A collective of all ranks.

    Args:
        repeat: the step's forward and backward passes, from the same state of the generators.
        sequences: numbers of the training sequences of each of this rank's micro-batches.
        loss, grad_norm: what was not finite, the same on all ranks.
    """
    with NonFiniteTracer(chunks, micro_batch_size=len(sequences[0])) as tracer:
        repeat()
    gathered: list[_Findings | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, _findings(chunks, tracer, sequences))
    first = min((found for found in gathered if found is not None), key=lambda found: found.key)
    parts = [f"loss {loss}, gradient norm {grad_norm}: {first.text}"]
    bad_weights = [name for found in gathered if found for name in found.bad_weights]
    bad_gradients = [name for found in gathered if found for name in found.bad_gradients]
    if bad_weights:
        parts.append(f"weights that were not finite before: {_listed(bad_weights)}")
    elif not math.isfinite(grad_norm) and bad_gradients:
        parts.append(f"gradients not finite in the end: {_listed(bad_gradients)}")
    return Explanation("; ".join(parts), weights_are_finite=not bad_weights)


def _findings(
    chunks: list[torch.nn.Module], tracer: NonFiniteTracer, sequences: list[range]
) -> _Findings:
    rank, modules = dist.get_rank(), unwrap_model(chunks)
    named = [item for module in modules for item in module.named_parameters()]
    weights = [
        f"{name}{_experts(name, value)} on rank {rank}"
        for name, value in named
        if not is_finite(value)
    ]
    gradients = [
        name
        for name, value in named
        if not is_finite(getattr(value, "main_grad", value.new_zeros(())))
    ]
    if not tracer.found:
        text = (
            "run again, the step gave finite values everywhere: a transient fault, as of "
            "hardware, is likely"
        )
        return _Findings((PARAMETER + 1, rank), text, weights, gradients)
    kind, place = min(tracer.found.items())
    text = (
        f"first on rank {rank} ({socket.gethostname()}) {_WHERE[kind].format(place)}"
        f"{_in_data(place, sequences) if kind != PARAMETER else ''}"
    )
    return _Findings((*_key(kind, place), rank), text, weights, gradients)


def _key(kind: int, place: Place) -> tuple[int, ...]:
    stage = parallel_state.get_pipeline_model_parallel_rank()
    along = (place.chunk, stage, place.order)
    if kind == FORWARD:
        # The calls of one micro-batch are in the same order on all ranks of a stage.
        return (kind, place.microbatch, *along)
    return (kind, place.microbatch, *(-number for number in along))


def _in_data(place: Place, sequences: list[range]) -> str:
    numbers = sequences[place.microbatch % len(sequences)]
    if place.row is not None:
        numbers = numbers[place.row : place.row + 1]
    which = f"sequence {numbers[0]}"
    if len(numbers) > 1:
        which = f"sequences {numbers[0]} to {numbers[-1]}"
    number = place.microbatch % len(sequences) + 1
    return f", micro-batch {number} of {len(sequences)}, training {which} (counted from 0)"


def _experts(name: str, weight: torch.Tensor) -> str:
    """Which experts of the model a weight [E, …] of the local ones is bad in."""
    if ".experts." not in name or weight.dim() != 3:
        return ""
    first = parallel_state.get_expert_model_parallel_rank() * len(weight)
    bad = (~torch.isfinite(weight.detach()).flatten(1).all(dim=1)).nonzero().flatten().tolist()
    return f", expert {', '.join(str(first + index) for index in bad)} (counted from 0)"


def _listed(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
