"""The block spec: what is swapped, and that nothing of Megatron's is edited in place."""

from __future__ import annotations

from itertools import combinations

import pytest
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_coe.megatron_compat import transformer_engine
from megatron_coe.megatron_compat.versions import part_class, part_submodules
from megatron_coe.model.backends import select
from megatron_coe.model.backends.select import TE_PARTS, resolve_backend
from megatron_coe.model.field_rules import RESIDUAL_MODES
from megatron_coe.model.layer_specs import get_coe_decoder_block_spec
from megatron_coe.model.moe.experts import GroupedExperts
from megatron_coe.model.moe.layer import CoELayer, get_bias_add_without_residual
from megatron_coe.model.moe.router import CoERouter, IterationRouters
from tests.builders import tiny_config


@pytest.fixture
def backend(single_rank):
    return resolve_backend("torch")


@pytest.mark.parametrize("independent", [True, False])
def test_moe_layers_become_coe_layers_and_dense_ones_stay(backend, independent: bool) -> None:
    config = tiny_config(num_layers=3, moe_layer_freq=[0, 1, 1], coe_independent_gate=independent)
    dense, *coe_layers = get_coe_decoder_block_spec(config, backend).layer_specs
    assert part_class(dense.submodules.mlp) is MLP
    assert dense.submodules.mlp_bda is get_bias_dropout_add
    for spec in coe_layers:
        mlp = spec.submodules.mlp
        assert part_class(mlp) is CoELayer
        parts = part_submodules(mlp)
        assert parts.router is (IterationRouters if independent else CoERouter)
        assert part_class(parts.experts) is GroupedExperts


@pytest.mark.parametrize("mode", RESIDUAL_MODES)
def test_the_mode_decides_whether_the_residual_stream_is_added(backend, mode: str) -> None:
    (spec,) = get_coe_decoder_block_spec(
        tiny_config(num_layers=1, coe_residual=mode), backend
    ).layer_specs
    adds = mode in ("outer", "inner_outer")
    assert spec.submodules.mlp_bda is (
        get_bias_dropout_add if adds else get_bias_add_without_residual
    )


def test_layers_share_no_spec_and_megatrons_own_is_untouched(backend) -> None:
    config = tiny_config(num_layers=3)
    first, second, _ = get_coe_decoder_block_spec(config, backend).layer_specs
    part_submodules(first.submodules.mlp).router = None
    first.submodules.self_attention.submodules.core_attention = None
    assert part_submodules(second.submodules.mlp).router is IterationRouters
    assert second.submodules.self_attention.submodules.core_attention is backend.core_attention()
    stock = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    assert all(part_class(spec.submodules.mlp) is MoELayer for spec in stock.layer_specs)


def test_every_local_module_is_the_backends(backend) -> None:
    config = tiny_config(num_layers=1)
    block = get_coe_decoder_block_spec(config, backend)
    layer = block.layer_specs[0].submodules
    norm = backend.layer_norm(rms_norm=True)
    assert block.layer_norm is layer.input_layernorm is layer.pre_mlp_layernorm is norm
    assert layer.self_attention.module is backend.mla_self_attention()
    assert layer.self_attention.submodules.kv_layernorm is norm
    assert layer.self_attention.submodules.core_attention is backend.core_attention()


@pytest.mark.skipif(not transformer_engine.is_installed(), reason="needs Transformer Engine")
@pytest.mark.parametrize("latent", [True, False], ids=["latent", "plain"])
@pytest.mark.parametrize("parts", [p for n in range(4) for p in combinations(TE_PARTS, n)])
def test_parts_are_transformer_engines_where_they_are_asked_for(
    single_rank, parts: tuple[str, ...], latent: bool
) -> None:
    """The specs alone: its modules are built on a GPU only."""
    config = tiny_config(num_layers=1, multi_latent_attention=latent)
    (spec,) = get_coe_decoder_block_spec(config, select.provider_of(parts)).layer_specs
    attention = spec.submodules.self_attention.submodules
    found = {
        "linear": attention.linear_proj,
        "attention": attention.core_attention,
        "experts": part_class(part_submodules(spec.submodules.mlp).experts),
    }
    for part, module in found.items():
        of_te = module.__module__ == "megatron.core.extensions.transformer_engine"
        assert (of_te or module.__name__ == "TEGroupedMLP") == (part in parts), (part, module)
