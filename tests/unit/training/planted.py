"""Faults that a test plants in a trainer, and all of its state to compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from megatron.core.utils import unwrap_model

from megatron_coe.distributed.seeds import rng_state
from megatron_coe.model.moe.layer import CoELayer
from megatron_coe.training.trainer import Trainer
from tests.unit.training.runs import weights


class NanBackward(torch.autograd.Function):
    """The identity, whose gradient has a NaN."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1)[0] = math.nan
        return gradient


def coe_layers(trainer: Trainer) -> list[CoELayer]:
    models = unwrap_model(trainer.train_state.chunks)
    return [m for model in models for m in model.modules() if isinstance(m, CoELayer)]


def everything(trainer: Trainer) -> dict[str, object]:
    """A copy of all that an update or a step could change."""
    parts = trainer.train_state.optimizer.chained_optimizers
    buffers = {name: b.clone() for name, b in trainer.train_state.chunks[0].named_buffers()}
    return {
        "weights": weights(trainer),
        "buffers": buffers,
        "moments": [copied(list(part.optimizer.state.values())) for part in parts],
        "masters": [copied(group["params"]) for part in parts for group in part.param_groups],
        "schedule": trainer.train_state.schedule.num_steps,
        "rng": copied(rng_state()),
        "progress": (trainer.progress.step, trainer.progress.samples),
    }


def copied(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return [copied(part) for part in value] if isinstance(value, (list, tuple)) else value


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@contextmanager
def planted(
    module: torch.nn.Module,
    change: Callable[[torch.Tensor], torch.Tensor],
    is_due: Callable[[int], bool],
) -> Iterator[None]:
    """`change` what a module gives at the calls that are due, counted from 0 in each layer pass."""
    calls = [0]

    def hook(module, args, output):
        number = calls[0]
        calls[0] += 1
        if not is_due(number):
            return None
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def nan_at(value: torch.Tensor) -> torch.Tensor:
    bad = torch.zeros_like(value)
    bad.view(-1)[0] = math.nan
    return value + bad
