"""What is reported of a training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_coe.moe.balance import collect_balance
from megatron_coe.provider import CoEModelProvider


@dataclass(frozen=True)
class StepFigures:
    """What a training step leaves to be reported."""

    loss: float
    """Per valid token of the global batch."""
    lr: float
    grad_norm: float
    seconds: float
    skipped: str | None = None
    """Why nothing was updated."""


def balance_figures(
    provider: CoEModelProvider, microbatches: int, device: torch.device
) -> dict[str, float]:
    """Balance losses of the latest step: mean over layers, and layer by layer. A collective."""
    values = collect_balance(provider, microbatches, device)
    layers = [index for index, moe in enumerate(provider.moe_layer_pattern) if moe]
    record = {}
    for loss, value_CL in values.items():
        for t, value_L in enumerate(value_CL[:, layers].tolist(), start=1):
            record[f"balance/{loss}/iteration_{t}"] = sum(value_L) / len(value_L)
            for layer, value in zip(layers, value_L, strict=True):
                record[f"balance/{loss}/iteration_{t}/layer_{layer + 1}"] = value
    return record
