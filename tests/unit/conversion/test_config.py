"""Configurations: both spellings of the residual mode, and what cannot be said is refused."""

from __future__ import annotations

import pytest

from megatron_coe.conversion.config import OWN, read_residual, to_hf_config, to_model_fields
from megatron_coe.hf import CoeConfig
from megatron_coe.hf.configuration_coe import OWN_KEYS
from tests.builders import tiny_config, tiny_provider

SPELLINGS = {  # the table of the authors' two formats
    "inner": (True, False, "inner"),
    "outer": (False, True, "outer"),
    "addinit": (None, None, "addinit"),
    "inner_outer": (True, True, None),
    "none": (False, False, "none"),
}


@pytest.mark.parametrize("mode", SPELLINGS)
def test_residual_modes_are_written_and_read_in_both_spellings(mode):
    inner, outer, named = SPELLINGS[mode]
    written = to_hf_config(tiny_config(coe_residual=mode))
    assert written.get("inner_residual") == inner
    assert written.get("outer_residual") == outer
    assert written.get("residual") == named
    assert read_residual(written) == mode
    if named:
        assert read_residual({"residual": named}) == mode
    if inner is not None:
        assert read_residual({"inner_residual": inner, "outer_residual": outer}) == mode


@pytest.mark.parametrize(
    "keys",
    [
        {"inner_residual": True, "outer_residual": False, "residual": "outer"},
        {"inner_residual": True, "outer_residual": True, "residual": "inner"},
        {"inner_residual": False, "outer_residual": False, "residual": "addinit"},
        {"residual": "inner_outer"},
        {"inner_residual": True},
    ],
)
def test_spellings_that_disagree_or_say_nothing_known(keys):
    with pytest.raises(ValueError, match="residual"):
        read_residual(keys)


FIELDS = [
    {"coe_iterations": 3, "coe_independent_gate": False},
    {"moe_layer_freq": [0, 0, 1, 1], "num_layers": 4},
    {"moe_layer_freq": [0, 0, 1, 0], "num_layers": 4},
    {"moe_layer_freq": 2, "num_layers": 4},
    {"q_lora_rank": 12, "moe_router_topk_scaling_factor": 2.0},
    {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0},
    {"moe_router_load_balancing_type": "aux_loss"},
    {"multi_latent_attention": False, "num_query_groups": 2, "kv_channels": 12},
    {"layernorm_epsilon": 1e-5, "init_method_std": 0.01, "rotary_base": 50000},
    {"moe_router_pre_softmax": False},
    {"coe_upcycled": True, "coe_residual": "outer"},
]


@pytest.mark.parametrize("changes", FIELDS, ids=[next(iter(fields)) for fields in FIELDS])
def test_fields_survive_the_way_there_and_back(changes):
    config = tiny_config(**changes)
    hf = to_hf_config(config)
    CoeConfig(**{key: value for key, value in hf.items() if key != "model_type"})
    again = tiny_provider(**to_model_fields(hf, "config.json"))
    for field in (*changes, "coe_residual", "ffn_hidden_size", "moe_ffn_hidden_size", "num_layers"):
        if field != "moe_layer_freq":
            assert getattr(again, field) == getattr(config, field), field
    assert again.moe_layer_pattern == config.moe_layer_pattern


def test_a_plain_chain_needs_no_key_of_ours():
    own = {"attention_type", "use_qk_norm", "qkv_bias", "latent_norm_eps", "use_expert_bias"}
    assert not own & to_hf_config(tiny_config()).keys()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"activation_func": "gelu"}, "activation_func"),
        ({"moe_shared_expert_intermediate_size": 17}, "moe_shared_expert_intermediate_size=17"),
        ({"num_layers": 4, "moe_layer_freq": [1, 1, 0, 1]}, "moe_layer_freq"),
        ({"rope_type": "rope"}, "rotary_scaling_factor=40"),
        ({"mtp_num_layers": 1}, "mtp_num_layers=1"),
        (
            {"moe_router_pre_softmax": False, "moe_router_topk_scaling_factor": 2.0},
            "moe_router_topk_scaling_factor=2.0",
        ),
        ({"qk_layernorm": False}, "qk_layernorm=False"),
        ({"rotary_percent": 0.5, "multi_latent_attention": False}, "rotary_percent"),
    ],
)
def test_what_the_format_cannot_express_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        to_hf_config(tiny_config(**changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ({"scoring_func": "relu"}, "scoring_func"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"latent_norm_eps": 1e-3}, "latent_norm_eps"),
    ],
)
def test_what_megatron_cannot_do_is_refused(changes, told):
    hf = to_hf_config(tiny_config()) | changes
    with pytest.raises(ValueError, match=rf"^config\.json: .*{told}"):
        to_model_fields(hf, "config.json")
    del hf["hidden_size"]
    if "model_type" not in changes:
        with pytest.raises(ValueError, match="lacks key 'hidden_size'"):
            to_model_fields(hf, "config.json")


def test_rope_in_the_spelling_of_transformers_5():
    hf = to_hf_config(tiny_config())
    rope = {**hf.pop("rope_scaling"), "rope_theta": hf.pop("rope_theta")}
    rope["rope_type"] = rope.pop("type")
    fields = to_model_fields({**hf, "rope_parameters": rope}, "config.json")
    assert fields == to_model_fields(to_hf_config(tiny_config()), "config.json")


def test_the_shipped_model_code_knows_the_same_keys_of_ours() -> None:
    assert OWN == OWN_KEYS
