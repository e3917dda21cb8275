"""Diagnosis of a step whose loss or gradients are NaN or Inf.

Every rank traces the step (`megatron_coe.fault_tolerance.nonfinite_tracer`), and the earliest
finding is reported: a value that is not finite spreads from its rank to others.
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
    FORWARD: "in the forward pass, in the output of {}",
    BACKWARD: "in the backward pass through {}",
    PARAMETER: "in the gradient of {}",
}
_MAX_NAMES = 8


@dataclass(frozen=True)
class Diagnosis:
    """Where a step became NaN or Inf, the same on every rank."""

    text: str
    weights_are_finite: bool
    """Before the step; where they were not, skipping steps does not help."""


@dataclass(frozen=True)
class _Finding:
    """The diagnosis of one rank."""

    key: tuple[int, ...]
    """Orders the findings of all ranks, the earliest first."""
    text: str
    weights: list[str]
    """Names of those that were not finite before the step."""
    gradients: list[str]
    """Names of those that are not finite after it."""


def diagnose(
    chunks: list[torch.nn.Module],
    rerun: Callable[[], object],
    sequences: list[range],
    loss: float,
    grad_norm: float,
) -> Diagnosis:
    """Rerun a step to find where it became NaN or Inf. A collective of all ranks.

    Args:
        chunks: the model chunks of this rank.
        rerun: runs the step's forward and backward passes, from the same RNG states.
        sequences: numbers of the training sequences in each of this rank's micro-batches.
        loss, grad_norm: of the step, the same on all ranks.
    """
    with NonFiniteTracer(chunks, micro_batch_size=len(sequences[0])) as tracer:
        rerun()
    gathered: list[_Finding | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, _find(chunks, tracer, sequences))
    findings = [finding for finding in gathered if finding is not None]
    first = min(findings, key=lambda finding: finding.key)
    parts = [f"loss {loss}, gradient norm {grad_norm}: {first.text}"]
    weights = [name for finding in findings for name in finding.weights]
    gradients = [name for finding in findings for name in finding.gradients]
    if weights:
        parts.append(f"weights that were not finite before: {_listed(weights)}")
    elif not math.isfinite(grad_norm) and gradients:
        parts.append(f"gradients that are not finite: {_listed(gradients)}")
    return Diagnosis("; ".join(parts), weights_are_finite=not weights)


def _find(
    chunks: list[torch.nn.Module], tracer: NonFiniteTracer, sequences: list[range]
) -> _Finding:
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
            "rerun, the step gave finite values everywhere: a transient fault, for example of the "
            "hardware, is likely"
        )
        return _Finding((PARAMETER + 1, rank), text, weights, gradients)
    kind, place = min(tracer.found.items())
    text = (
        f"first on rank {rank} ({socket.gethostname()}) {_WHERE[kind].format(place)}"
        f"{_in_data(place, sequences) if kind != PARAMETER else ''}"
    )
    return _Finding((*_key(kind, place), rank), text, weights, gradients)


def _key(kind: int, place: Place) -> tuple[int, ...]:
    """Return what orders the findings of all ranks in time."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    along = (place.chunk, stage, place.order)
    if kind == FORWARD:
        # The calls of one micro-batch are in the same order on all ranks of a stage.
        return (kind, place.microbatch, *along)
    return (kind, place.microbatch, *(-number for number in along))


def _in_data(place: Place, sequences: list[range]) -> str:
    """Return which micro-batch and training sequences a place belongs to."""
    numbers = sequences[place.microbatch % len(sequences)]
    if place.row is not None:
        numbers = numbers[place.row : place.row + 1]
    which = f"sequence {numbers[0]}"
    if len(numbers) > 1:
        which = f"sequences {numbers[0]} to {numbers[-1]}"
    number = place.microbatch % len(sequences) + 1
    return f", micro-batch {number} of {len(sequences)}, training {which} (counted from 0)"


def _experts(name: str, weight: torch.Tensor) -> str:
    """Return which of the model's experts are not finite in a weight [E, …] of the local ones."""
    if ".experts." not in name or weight.dim() != 3:
        return ""
    first = parallel_state.get_expert_model_parallel_rank() * len(weight)
    bad = (~torch.isfinite(weight.detach()).flatten(1).all(dim=1)).nonzero().flatten().tolist()
    return f", expert {', '.join(str(first + index) for index in bad)} (counted from 0)"


def _listed(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
