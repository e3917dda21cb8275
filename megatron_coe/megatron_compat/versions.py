"""What Megatron-Core's 0.16 line and its later one (0.18 to 0.20 dev, Megatron-LM's main branch) do
differently, in one place; everything else of the package is written once for both.

The package requires the 0.16 wheel. A Megatron-LM checkout brings its own `megatron.core`, which
stands before the wheel on the path: that is how the later line is met.

The 0.16 line describes a layer's parts by `ModuleSpec`s, the later one by `functools.partial`s of
their classes.
"""

from __future__ import annotations

from copy import copy
from functools import partial

import torch
from megatron.core import __version__ as MEGATRON_VERSION
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

_MINOR = int(MEGATRON_VERSION.split(".")[1]) if MEGATRON_VERSION.startswith("0.") else 0

if _MINOR != 16 and _MINOR < 18:
    raise ImportError(
        f"megatron-core {MEGATRON_VERSION} is not supported: its MoE layers are described neither "
        "as in 0.16 nor as in 0.18 and later. Install megatron-core 0.16, or use a Megatron-LM "
        "checkout of the 0.16 line or from 0.18 on."
    )

PARTS_ARE_PARTIALS = _MINOR >= 18
"""Whether layer parts are `functools.partial`s of classes (later line) or `ModuleSpec`s (0.16)."""

# --- parts of layers ------------------------------------------------------------------------------

Part = type | partial | ModuleSpec
"""How a spec names a module to build."""


def part_class(part: Part) -> object:
    """What a spec's part will build: a class, or a function that makes one."""
    if isinstance(part, ModuleSpec):
        return part.module
    return part.func if isinstance(part, partial) else part


def part_submodules(part: Part) -> object:
    """The parts of a part, or None."""
    if isinstance(part, ModuleSpec):
        return part.submodules
    return part.keywords.get("submodules") if isinstance(part, partial) else None


def with_module(part: Part, module: type, **params: object) -> Part:
    """The same part with another class, and these arguments to its constructor besides."""
    if isinstance(part, ModuleSpec):
        part = copy(part)
        part.module, part.params = module, {**(part.params or {}), **params}
        return part
    return partial(module, *part.args, **{**part.keywords, **params})


ExpertModules = tuple[type, object] | partial
"""What `BackendSpecProvider.grouped_mlp_modules` returns: (class, submodules) or a `partial`."""


def expert_modules(module: type, submodules: object | None = None) -> ExpertModules:
    """These experts as `grouped_mlp_modules` returns them."""
    if not PARTS_ARE_PARTIALS:
        return module, submodules
    return partial(module) if submodules is None else partial(module, submodules=submodules)


def experts_part(modules: ExpertModules) -> Part:
    """What `grouped_mlp_modules` returned, as `MoESubmodules.experts` takes it."""
    if isinstance(modules, partial):
        return modules
    module, submodules = modules
    return ModuleSpec(module=module, submodules=submodules)


def no_graph_scopes() -> list | None:
    """`cuda_graph_scope` of a configuration without CUDA graphs of parts of a layer.

    The later line renamed the field to `cuda_graph_modules` and wants the old one unset.
    """
    return None if PARTS_ARE_PARTIALS else []


# --- routers ---------------------------------------------------------------------


def record_balance_loss(
    name: str,
    loss: Tensor,
    layer_number: int,
    num_layers: int,
    reduce_group: torch.distributed.ProcessGroup,
    reduce_group_has_dp: bool,
) -> None:
    """Add a loss to Megatron's per-layer log of this step; `layer_number` counts from 1."""
    if PARTS_ARE_PARTIALS:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        get_moe_metrics_tracker().record(
            name,
            loss,
            layer_number,
            num_layers,
            reduce_group=reduce_group,
            needs_dp_avg=not reduce_group_has_dp,
        )
        return
    from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

    save_to_aux_losses_tracker(
        name,
        loss,
        layer_number,
        num_layers,
        reduce_group=reduce_group,
        reduce_group_has_dp=reduce_group_has_dp,
    )
