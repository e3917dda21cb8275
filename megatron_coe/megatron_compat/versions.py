"""What Megatron-Core's 0.16 line and its current one (0.18 and later) name or shape differently.

Everything else of the package is written once for both. Python 3.12 and later have the current
line's wheels (0.19.2), Python 3.10 and 3.11 the last of the 0.16 line (0.16.1); a Megatron-LM
checkout brings its own `megatron.core`, which stands before the wheel on the path.

The 0.16 line describes a layer's parts by `ModuleSpec`s, the current one by `functools.partial`s of
their classes.
"""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from megatron.core import __version__ as MEGATRON_VERSION
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.utils import get_batch_on_this_cp_rank as _get_batch_on_this_cp_rank
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

_MINOR = int(MEGATRON_VERSION.split(".")[1]) if MEGATRON_VERSION.startswith("0.") else 0

if _MINOR != 16 and _MINOR < 18:
    raise ImportError(
        f"megatron-core {MEGATRON_VERSION} is not supported: its MoE layers are described neither "
        "as in 0.16 nor as in 0.18 and later. Install megatron-core 0.19 (Python 3.12 and later) "
        "or 0.16.1 (Python 3.10 and 3.11), or use a Megatron-LM checkout of such a version."
    )

PARTS_ARE_PARTIALS = _MINOR >= 18
"""Whether layer parts are `functools.partial`s of classes (current line), not `ModuleSpec`s."""

RETIRED_FIELDS = {
    "async_tensor_model_parallel_allreduce": (True, False),
    "moe_extended_tp": (False,),
    "moe_use_legacy_grouped_gemm": (False,),
}
"""Model fields that the current line has dropped, with their harmless values: settings written
for 0.16 may name them."""

# --- parts of layers ------------------------------------------------------------------------------

Part: TypeAlias = type | partial[Any] | ModuleSpec
"""How a spec names a module to build."""


def part_class(part: Part) -> object:
    """Return the class that a spec's part will build, or a function that makes one."""
    if isinstance(part, ModuleSpec):
        return part.module
    if isinstance(part, partial):  # of a class, or of a class method that makes one
        return getattr(part.func, "__self__", part.func)
    return part


def build_part(part: Part, **arguments: object) -> torch.nn.Module:
    """Build what a spec's part describes."""
    return part(**arguments) if isinstance(part, partial) else build_module(part, **arguments)


def part_submodules(part: Part) -> Any:
    """Return the submodules of a part, or None."""
    if isinstance(part, ModuleSpec):
        return part.submodules
    return part.keywords.get("submodules") if isinstance(part, partial) else None


def with_module(part: Part, module: type, **params: object) -> Part:
    """Return the part with another class, and these further arguments to its constructor."""
    if isinstance(part, ModuleSpec):
        part = copy(part)
        part.module, part.params = module, {**(part.params or {}), **params}
        return part
    given = part if isinstance(part, partial) else partial(part)
    return partial(module, *given.args, **{**given.keywords, **params})


ExpertModules: TypeAlias = tuple[type, object] | partial[Any]
"""What `BackendSpecProvider.grouped_mlp_modules` returns: (class, submodules) or a `partial`."""


def expert_modules(module: type, submodules: object | None = None) -> ExpertModules:
    """Return these experts as `grouped_mlp_modules` returns them."""
    if not PARTS_ARE_PARTIALS:
        return module, submodules
    return partial(module) if submodules is None else partial(module, submodules=submodules)


def experts_part(modules: ExpertModules) -> Part:
    """Return what `grouped_mlp_modules` returned, as `MoESubmodules.experts` takes it."""
    if isinstance(modules, partial):
        return modules
    module, submodules = modules
    return ModuleSpec(module=module, submodules=submodules)


def no_graph_scopes() -> list[Any] | None:
    """Return the `cuda_graph_scope` of a configuration without partial CUDA graphs.

    The current line renamed the field to `cuda_graph_modules` and wants the old one unset.
    """
    return None if PARTS_ARE_PARTIALS else []


# --- batches --------------------------------------------------------------------------------------


def get_batch_on_this_cp_rank(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this context-parallel rank's two chunks of each sequence, by Megatron.

    The current line wants the group: without it a batch is sliced over all ranks of the world, and
    every layout but context parallelism alone silently trains on parts of its sequences.

    Args:
        batch: tensors [B, S] by name (an `attention_mask` [B, 1, S, S]).
    """
    if not PARTS_ARE_PARTIALS:
        return _get_batch_on_this_cp_rank(batch)
    group = parallel_state.get_context_parallel_group()
    return _get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)


# --- auxiliary losses -----------------------------------------------------------------------------


def record_aux_loss(
    name: str,
    loss: Tensor,
    layer_number: int,
    num_layers: int,
    reduce_group: torch.distributed.ProcessGroup,
    reduce_group_has_dp: bool,
) -> None:
    """Add a loss to Megatron's per-layer log of this step; `layer_number` counts from 1."""
    if PARTS_ARE_PARTIALS:
        moe_metrics_tracker().record(
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


def recorded_aux_losses() -> dict[str, Tensor]:
    """Return what this rank has recorded since `clear_aux_losses`, by name [num_layers]."""
    if PARTS_ARE_PARTIALS:
        return {name: entry.values for name, entry in moe_metrics_tracker().metrics.items()}
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    tracker = get_moe_layer_wise_logging_tracker()
    return {name: entry["values"] for name, entry in tracker.items()}


def clear_aux_losses() -> None:
    """Clear Megatron's log of auxiliary losses, which the first model's layers have sized."""
    if PARTS_ARE_PARTIALS:
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

        destroy_moe_metrics_tracker()
        return
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    get_moe_layer_wise_logging_tracker().clear()


def moe_metrics_tracker() -> MoEMetricsTracker:
    """Return the current line's log of auxiliary losses."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    return get_moe_metrics_tracker()
