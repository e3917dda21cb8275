"""Factors on the learning rate, chosen by patterns of weights' names.

Names and patterns are those of `model.freezing`; of several patterns that match, the last counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from megatron.core.models.gpt.gpt_model import GPTModel
from torch.nn import Parameter

from megatron_coe.hf.weight_names import ModelShape
from megatron_coe.model.freezing import global_names, trained_weights


def lr_factor(name: str, factors: Mapping[str, float]) -> float:
    """Return the factor of the last pattern that matches a name; 1 without any."""
    matching = [factor for pattern, factor in factors.items() if fnmatchcase(name, pattern)]
    return matching[-1] if matching else 1.0


def lr_factors(model: GPTModel, factors: Mapping[str, float]) -> dict[Parameter, float]:
    """Return the factor of each parameter of a pipeline stage's part of a model."""
    return {p: lr_factor(name, factors) for p, name in global_names(model).items()}


def check_factors(
    config: ModelShape, factors: Mapping[str, float], frozen: Sequence[str] = ()
) -> None:
    """Raise ValueError for a pattern that matches no trained weight, or if all learn alike."""
    names = list(trained_weights(config, frozen))
    for pattern in factors:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"train.lr_mult: {pattern!r} matches no weight that is trained; their names are "
                f"like {names[len(names) // 2]}"
            )
    if factors and all(lr_factor(name, factors) != 1.0 for name in names):
        raise ValueError(
            f"train.lr_mult={dict(factors)}: leaves no weight with train.lr itself; choose "
            "train.lr so that some weights keep it"
        )
