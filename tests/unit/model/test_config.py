"""What `CoEConfig` accepts, refuses, and says when it refuses."""

from __future__ import annotations

import pytest
import torch

from megatron_coe.megatron_compat.transformer_engine import is_installed
from megatron_coe.model.config import CoEConfig
from megatron_coe.model.field_rules import RESIDUAL_MODES
from tests.builders import tiny_config, tiny_provider

GROUPS = {
    "num_moe_experts": 8,
    "moe_router_topk": 3,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
}

REFUSED = [
    # (fields, what the message must name)
    ({"coe_iterations": 0}, ["coe_iterations=0", "from 1 to"]),
    ({"coe_iterations": True}, ["coe_iterations=True", "integer"]),
    ({"coe_iterations": 1.5}, ["coe_iterations=1.5", "integer"]),
    ({"coe_residual": "innner"}, ["coe_residual='innner'", *RESIDUAL_MODES]),
    ({"moe_router_topk": 8}, ["moe_router_topk=8", "num_moe_experts=7", "at most 7"]),
    ({"moe_router_topk": 0}, ["moe_router_topk=0", ">= 1"]),
    ({"num_moe_experts": None}, ["num_moe_experts=None"]),
    ({"num_moe_experts": 0}, ["num_moe_experts=0"]),
    (
        {"num_moe_experts": 63, "expert_model_parallel_size": 8},
        ["num_moe_experts=63", "expert_model_parallel_size=8", "1, 3, 7, 9, 21, 63", "64"],
    ),
    (
        {"num_moe_experts": 47, "expert_model_parallel_size": 2},
        ["num_moe_experts=47", "expert_model_parallel_size=2", "1, 47"],
    ),
    ({"tensor_model_parallel_size": 3}, ["num_attention_heads=4", "=3", "1, 2, 4"]),
    ({"pipeline_model_parallel_size": 3}, ["num_layers=2", "=3", "1, 2"]),
    ({"sequence_parallel": True}, ["sequence_parallel=True", "tensor_model_parallel_size=1"]),
    (
        {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
        ["moe_router_num_groups=2", "num_moe_experts=7"],
    ),
    (
        {**GROUPS, "moe_router_group_topk": 1},
        ["moe_router_group_topk=1", "moe_router_topk=3"],
    ),
    ({**GROUPS, "moe_router_group_topk": 4}, ["moe_router_group_topk=4", "'max'"]),
    ({**GROUPS, "moe_router_group_score": "mean"}, ["moe_router_group_score='mean'", "max"]),
    (
        {**GROUPS, "moe_router_group_score": "max", "moe_router_fusion": True},
        ["moe_router_fusion=True"],
    ),
    ({"num_layers": 0}, ["num_layers=0"]),
    ({"moe_layer_freq": [1, 0, 1]}, ["moe_layer_freq=[1, 0, 1]", "num_layers=2"]),
    ({"moe_layer_freq": [1, 2]}, ["moe_layer_freq=[1, 2]"]),
    ({"coe_upcycled": True}, ["coe_upcycled=True", "coe_residual='inner'", "'outer'"]),
    (
        {"coe_upcycled": True, "coe_residual": "inner_outer"},
        ["coe_upcycled=True", "coe_residual='inner_outer'", "'outer'"],
    ),
    ({"hidden_dropout": 0.1}, ["hidden_dropout=0.1", "coe_residual='inner'", "outer"]),
    ({"activation_func": "swish"}, ["activation_func='swish'", "silu"]),
    ({"add_bias_linear": True}, ["add_bias_linear=True"]),
    ({"moe_latent_size": 8}, ["moe_latent_size=8"]),
    *(
        [({"moe_use_legacy_grouped_gemm": True}, ["moe_use_legacy_grouped_gemm=True"])]
        if hasattr(CoEConfig, "moe_use_legacy_grouped_gemm")  # the current line has no such field
        else []
    ),
    ({"overlap_moe_expert_parallel_comm": True}, ["overlap_moe_expert_parallel_comm=True"]),
    ({"delay_wgrad_compute": True}, ["delay_wgrad_compute=True", "overlap_moe"]),
    (
        {"moe_router_load_balancing_type": "global_aux_loss", "coe_independent_gate": False},
        ["moe_router_load_balancing_type='global_aux_loss'", "coe_independent_gate=False"],
    ),
    ({"moe_router_load_balancing_type": "sinkhorn"}, ["sinkhorn", "seq_aux_loss"]),
    ({"cuda_graph_scope": ["moe_router"]}, ["cuda_graph_scope", "moe_router"]),
    ({"multi_latent_attention": False, "rope_type": "yarn"}, ["rope_type='yarn'", "'rope'"]),
    ({"rope_type": "alibi"}, ["rope_type='alibi'", "'yarn'"]),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=lambda value: str(value)[:40])
def test_wrong_values_are_refused_by_name(fields: dict, named: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        tiny_config(**fields)
    for words in named:
        assert words in str(error.value)


@pytest.mark.skipif(is_installed(), reason="Transformer Engine is there")
@pytest.mark.parametrize("name", ["fp8", "fp4", "moe_permute_fusion", "moe_router_fusion"])
def test_what_megatron_configures_with_transformer_engine_only(name: str) -> None:
    value = "hybrid" if name.startswith("fp") else True
    with pytest.raises(ValueError, match=f"{name}={value!r} needs Transformer Engine"):
        tiny_config(**{name: value})


def test_expert_bias_needs_sigmoid_scores() -> None:
    with pytest.raises(ValueError, match="sigmoid"):
        tiny_config(moe_router_enable_expert_bias=True)
    config = tiny_config(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
    assert config.moe_router_enable_expert_bias


def test_dropout_is_allowed_where_the_residual_stream_is_added() -> None:
    assert tiny_config(hidden_dropout=0.1, coe_residual="outer").hidden_dropout == 0.1


def test_attention_kind_decides_rope_and_latent_norm() -> None:
    latent, plain = tiny_config(), tiny_config(multi_latent_attention=False)
    assert (latent.rope_type, latent.qk_layernorm) == ("yarn", True)
    assert (plain.rope_type, plain.qk_layernorm) == ("rope", False)
    assert tiny_config(multi_latent_attention=False, qk_layernorm=True).qk_layernorm


def test_activation_may_be_named_or_given() -> None:
    assert tiny_config(activation_func="gelu").activation_func is torch.nn.functional.gelu
    assert tiny_config(activation_func=torch.tanh).activation_func is torch.tanh


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_vocabulary_padding_does_not_depend_on_the_layout(tp: int) -> None:
    config = CoEConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=8,
        num_moe_experts=8,
        vocab_size=1000,
        tensor_model_parallel_size=tp,
    )
    assert config.padded_vocab_size == 1024


def test_output_layers_start_with_the_std_of_all_others() -> None:
    """Megatron would draw them with std / sqrt(2 L); the authors do not."""
    config = tiny_config(num_layers=8, init_method_std=0.5)
    weight = torch.empty(400, 400)
    config.output_layer_init_method(weight)
    assert weight.std().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_query_groups": 4, "num_attention_heads": 6}, "num_query_groups=4 does not divide"),
        ({"kv_channels": 7}, "kv_channels=7"),
        ({"hidden_size": 36, "num_attention_heads": 12}, "kv_channels=3"),
    ],
    ids=str,
)
def test_plain_attention_that_dies_in_its_first_step_is_refused(
    single_rank, monkeypatch, fields, says
):
    fields = {"multi_latent_attention": False, **fields}
    with pytest.raises(ValueError, match=says):
        tiny_provider(**fields)
    monkeypatch.setattr(CoEConfig, "_check_plain_attention", lambda self: None)
    model = tiny_provider(**fields).provide()
    with pytest.raises(RuntimeError):
        model(torch.randint(96, (2, 8)), torch.arange(8).expand(2, 8), None)
