"""Parts of layers, as either line of Megatron-Core names them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_coe.megatron_compat.versions import (
    experts_part,
    part_class,
    part_submodules,
    with_module,
)
from megatron_coe.model.layer_specs import _substitute


class Old(torch.nn.Module):
    pass


class New(torch.nn.Module):
    pass


def parts() -> list:
    """The same part in both ways of naming it."""
    submodules = MLPSubmodules(linear_fc1=Old, linear_fc2=Old)
    return [
        ModuleSpec(module=Old, submodules=submodules, params={"a": 1}),
        partial(Old, submodules=submodules, a=1),
    ]


@pytest.mark.parametrize("part", parts(), ids=["spec", "partial"])
def test_a_part_is_read_and_rebuilt(part) -> None:
    assert part_class(part) is Old
    other = with_module(part, New, b=2)
    assert (part_class(other), part_class(part)) == (New, Old)
    assert part_submodules(other) is part_submodules(part)
    arguments = other.params if isinstance(other, ModuleSpec) else other.keywords
    assert {name: arguments[name] for name in ("a", "b")} == {"a": 1, "b": 2}
    assert "b" not in (part.params if isinstance(part, ModuleSpec) else part.keywords)


def test_a_class_by_itself_is_a_part_too() -> None:
    assert part_class(Old) is Old and part_submodules(Old) is None


@pytest.mark.parametrize("part", parts(), ids=["spec", "partial"])
def test_modules_are_substituted_inside_either(part) -> None:
    submodules = part_submodules(_substitute(part, {Old: New}))
    assert submodules.linear_fc1 is submodules.linear_fc2 is New


def test_experts_of_either_answer() -> None:
    submodules = MLPSubmodules(linear_fc1=Old, linear_fc2=Old)
    built = experts_part((Old, submodules))
    assert part_class(built) is Old and part_submodules(built) is submodules
    later = partial(Old, submodules=submodules)
    assert experts_part(later) is later
