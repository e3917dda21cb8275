"""Layer specs: Megatron's decoder block with its MoE layers made CoE layers.

Plugs into megatron/core/models/gpt/gpt_layer_specs.py. Megatron repeats one spec object for every
layer of a kind, so everything here works on a deep copy.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_coe.megatron_compat.versions import (
    experts_part,
    part_class,
    part_submodules,
    with_module,
)
from megatron_coe.model.backends.torch import TorchSpecProvider
from megatron_coe.model.config import CoEConfig
from megatron_coe.model.moe.layer import CoELayer, get_bias_add_without_residual
from megatron_coe.model.moe.router import CoERouter, IterationRouters


def get_coe_decoder_block_spec(
    config: CoEConfig,
    backend: BackendSpecProvider,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> TransformerBlockSubmodules:
    """Return the spec of this pipeline stage's decoder layers, CoE where `moe_layer_freq` has MoE.

    Args:
        backend: which modules to build of; Megatron's Transformer Engine provider, or the
            TE-free `megatron_coe.model.backends.torch.TorchSpecProvider`.
        pg_collection: process groups of the CoE layers; None for Megatron's global ones.
    """
    # Transformer Engine fuses the norm into the first linear layer: that decides between the two.
    use_transformer_engine = backend.fuse_layernorm_and_linear()
    block = deepcopy(
        get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=use_transformer_engine,
            normalization=config.normalization,
            vp_stage=vp_stage,
        )
    )
    # Megatron repeats the same object: without this, layers would share one spec even now.
    block.layer_specs = [deepcopy(spec) for spec in block.layer_specs]
    if use_transformer_engine:
        substitutes = backend.substitutes()
        for spec in block.layer_specs:
            _share_checkpoint_keys(spec.submodules, config)
    else:
        rms_norm = config.normalization == "RMSNorm"
        substitutes = _local_substitutes(backend, rms_norm)
        block.layer_norm = backend.layer_norm(rms_norm=rms_norm)
    block.layer_specs = [_substitute(spec, substitutes) for spec in block.layer_specs]
    for spec in block.layer_specs:
        if part_class(spec.submodules.mlp) is MoELayer:
            _make_coe_layer(spec, config, backend, pg_collection)
    return block


def _share_checkpoint_keys(layer: TransformerLayerSubmodules, config: CoEConfig) -> None:
    """Name norms in checkpoints as the other backend does, in place.

    Transformer Engine's linear layers hold the norm before them. Megatron's local layers of plain
    attention go by its names for norms, whatever follows them; those of latent attention do not.
    """
    if config.multi_latent_attention:
        shared = {
            "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
            "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
            "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
        }
    else:
        shared = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    layer.sharded_state_dict_keys_map = {**layer.sharded_state_dict_keys_map, **shared}


def _make_coe_layer(
    layer_spec: ModuleSpec,
    config: CoEConfig,
    backend: BackendSpecProvider,
    pg_collection: ProcessGroupCollection | None,
) -> None:
    """Make a decoder layer's MoE layer a CoE layer, in place."""
    layer = layer_spec.submodules
    parts = part_submodules(layer.mlp)
    parts.router = IterationRouters if config.coe_independent_gate else CoERouter
    parts.experts = experts_part(backend.grouped_mlp_modules(config.moe_grouped_gemm))
    # The 0.16 line hands process groups to Megatron's own classes only.
    layer.mlp = with_module(layer.mlp, CoELayer, pg_collection=pg_collection)
    layer.mlp_bda = get_bias_dropout_add if config.adds_residual else get_bias_add_without_residual


def _local_substitutes(backend: TorchSpecProvider, rms_norm: bool) -> dict[type, type]:
    """Return Megatron's TE-free modules and what `backend` has in their place."""
    local = LocalSpecProvider()
    return {
        local.layer_norm(rms_norm=rms_norm): backend.layer_norm(rms_norm=rms_norm),
        local.core_attention(): backend.core_attention(),
        MLASelfAttention: backend.mla_self_attention(),
        local.column_parallel_linear(): backend.column_parallel_linear(),
        local.row_parallel_linear(): backend.row_parallel_linear(),
    }


def _substitute(spec: Any, substitutes: dict[type, type]) -> Any:
    """Replace modules throughout a spec, in place, and return it (or a module's substitute)."""
    if isinstance(spec, type):
        return substitutes.get(spec, spec)
    if isinstance(spec, partial):
        keywords = {name: _substitute(value, substitutes) for name, value in spec.keywords.items()}
        return partial(spec.func, *spec.args, **keywords)
    if is_dataclass(spec):
        for field in fields(spec):
            setattr(spec, field.name, _substitute(getattr(spec, field.name), substitutes))
    return spec
