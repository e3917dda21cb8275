"""Configurations: both spellings of the residual mode, and what cannot be said is refused."""

from __future__ import annotations

import math

import pytest
from transformers import DeepseekV2Config

from megatron_coe.conversion.hf_config import (
    deepseek_v2_notes,
    import_notices,
    residual,
    to_deepseek_v2_config,
    to_hf_config,
    to_model_fields,
)
from megatron_coe.conversion.hf_config.keys import OWN
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
    assert residual.read(written) == mode
    if named:
        assert residual.read({"residual": named}) == mode
    if inner is not None:
        assert residual.read({"inner_residual": inner, "outer_residual": outer}) == mode


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
        residual.read(keys)


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
    {"mtp_num_layers": 2},
]


@pytest.mark.parametrize("changes", FIELDS, ids=[next(iter(fields)) for fields in FIELDS])
def test_fields_survive_the_way_there_and_back(changes):
    config = tiny_config(**changes)
    hf = to_hf_config(config)
    written = CoeConfig(**{key: value for key, value in hf.items() if key != "model_type"})
    assert to_model_fields(written.to_dict(), "config.json") == to_model_fields(hf, "config.json")
    again = tiny_provider(**to_model_fields(hf, "config.json"))
    for field in (*changes, "coe_residual", "ffn_hidden_size", "moe_ffn_hidden_size", "num_layers"):
        if field != "moe_layer_freq":
            assert getattr(again, field) == getattr(config, field), field
    assert again.moe_layer_pattern == config.moe_layer_pattern


def test_a_plain_coe_model_needs_no_key_of_ours():
    own = {"attention_type", "use_qk_norm", "qkv_bias", "latent_norm_eps", "use_expert_bias"}
    own |= {"coe_upcycled", "num_nextn_predict_layers"}
    assert not own & to_hf_config(tiny_config()).keys()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"activation_func": "gelu"}, "activation_func"),
        ({"moe_shared_expert_intermediate_size": 17}, "moe_shared_expert_intermediate_size=17"),
        ({"num_layers": 4, "moe_layer_freq": [1, 1, 0, 1]}, "moe_layer_freq"),
        ({"rope_type": "rope"}, "rotary_scaling_factor=40"),
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


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ({"scoring_func": "relu"}, "scoring_func"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"num_experts": 6}, "num_experts=6"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ({"sliding_window": 16}, "sliding_window=16 is not known"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings=64"),
        ({"rope_theta": 5000, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta disagree"),
        ({"rope_scaling": {"rope_theta": 5000}}, "rope_theta disagree"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_parameters disagr",
        ),
        ({"rope_scaling": {**YARN, "truncate": False}}, r"rope_scaling\.truncate=False"),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, r"scaling\.partial_rotary"),
        ({"rope_scaling": {**YARN, "low_freq_factor": 1}}, r"rope_scaling\.low_freq_factor=1"),
        ({"rope_scaling": {**YARN, "rope_type": "linear"}}, "linear"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"latent_norm_eps": 1e-3}, "latent_norm_eps"),
    ],
)
def test_what_megatron_cannot_do_is_refused(changes, told):
    hf = to_hf_config(tiny_config()) | changes
    with pytest.raises(ValueError, match=rf"^config\.json: .*{told}"):
        to_model_fields(hf, "config.json")


@pytest.mark.parametrize("key", ["hidden_size", "n_routed_experts", "kv_lora_rank", "rms_norm_eps"])
def test_a_key_that_is_missing_or_null_is_named(key):
    hf = to_hf_config(tiny_config())
    with pytest.raises(ValueError, match=rf"^config\.json: lacks key '{key}'"):
        to_model_fields(hf | {key: None}, "config.json")
    del hf[key]
    with pytest.raises(ValueError, match=rf"^config\.json: lacks key '{key}'"):
        to_model_fields(hf, "config.json")


NATIVE = {"coe_iterations": 1, "coe_residual": "outer"}
# What DeepSeek's own code knows, with its defaults (configuration_deepseek.py of DeepSeek-V2).
OF_DEEPSEEK = {
    "ep_size": 1,
    "pretraining_tp": 1,
    "topk_method": "gready",
    "scoring_func": "softmax",
    "n_group": None,
    "topk_group": None,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "seq_aux": True,
    "aux_loss_alpha": 0.001,
    "attention_bias": False,
    "use_cache": True,
    "attention_dropout": 0.0,
    "pad_token_id": None,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "auto_map": {},
    "_name_or_path": "deepseek-ai/DeepSeek-V2",
}


def native(**changes):
    return to_deepseek_v2_config(tiny_config(**NATIVE)) | changes


def test_every_key_of_a_standard_moe_has_a_decision():
    """Of transformers, whichever version, as it writes and as it holds them; and of DeepSeek."""
    written = native()
    expected = to_model_fields(written, "config.json")
    config = DeepseekV2Config(**{key: written[key] for key in written if key != "model_type"})
    assert to_model_fields(config.to_dict(), "config.json") == expected
    assert to_model_fields(config.to_diff_dict(), "config.json") == expected
    assert to_model_fields(written | OF_DEEPSEEK, "config.json") == expected
    assert to_model_fields(written | {"sliding_window": None}, "config.json") == expected


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ({"inner_iter": 2}, "inner_iter=2"),
        ({"residual": "inner"}, "residual='inner'"),
        ({"attention_type": "mha"}, "attention_type='mha'"),
        ({"latent_norm_eps": 1e-5, "rms_norm_eps": 1e-5}, "latent_norm_eps=1e-05"),
        ({"use_expert_bias": True}, "use_expert_bias=True"),
    ],
)
def test_what_a_standard_moe_does_not_read_is_refused(changes, told):
    with pytest.raises(ValueError, match=rf"^config\.json: .*{told}"):
        to_model_fields(native(**changes), "config.json")


@pytest.mark.parametrize(
    "yarn", [{"mscale": 0.707, "mscale_all_dim": 0}, {"mscale_all_dim": 0.707}, {"mscale": 0.0}]
)
def test_a_yarn_that_two_programs_read_differently_is_refused(yarn):
    hf = native(rope_scaling={**YARN, **yarn})
    with pytest.raises(ValueError, match=r"mscale=.*attention_factor"):
        to_model_fields(hf, "config.json")
    hf["rope_scaling"]["attention_factor"] = 1.3
    fields = to_model_fields(hf, "config.json")
    again = to_deepseek_v2_config(tiny_config(**NATIVE, **of_rope(fields)))["rope_scaling"]
    stated = again.get("attention_factor") or yarn_scale(again["mscale"], again["mscale_all_dim"])
    assert stated == pytest.approx(1.3, rel=1e-12)
    assert of_rope(to_model_fields(native(rope_scaling=again), "config.json")) == of_rope(fields)


def of_rope(fields):
    names = ("rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim")
    return {name: fields[name] for name in names}


def yarn_scale(over, under, factor=40):
    """DeepSeek's code: get_mscale(factor, mscale) / get_mscale(factor, mscale_all_dim)."""
    return (0.1 * over * math.log(factor) + 1) / (0.1 * under * math.log(factor) + 1)


def test_programs_that_differ_about_normalized_weights_are_told():
    assert import_notices(native()) == []
    (notice,) = import_notices(native(norm_topk_prob=True))
    assert "norm_topk_prob" in notice
    assert "transformers" in notice
    assert import_notices({"model_type": "coe_deepseekv2", "norm_topk_prob": True}) == []


@pytest.mark.parametrize(
    ("changes", "itemsize", "told"),
    [
        ({}, 4, ["transformers 5.15"]),
        ({"mscale_all_dim": 0.0}, 4, []),
        ({"rotary_scaling_factor": 1.0}, 4, []),
        ({"rope_type": "rope", "rotary_scaling_factor": 1.0, "moe_ffn_hidden_size": 12}, 4, []),
        (
            {"mscale_all_dim": 0.0, "moe_ffn_hidden_size": 12},
            2,
            ['experts_implementation="eager"'],
        ),
        (
            {
                "num_moe_experts": 8,
                "moe_router_num_groups": 4,
                "moe_router_group_topk": 2,
                "moe_router_group_score": "max",
                "mscale_all_dim": 0.0,
            },
            2,
            ["5.0 to 5.12"],
        ),
    ],
)
def test_a_card_says_which_versions_differ_about_the_model(changes, itemsize, told):
    notes = deepseek_v2_notes(tiny_config(**NATIVE, **changes), itemsize).split("\n\n")
    assert len(list(filter(None, notes))) == len(told)
    for note, part in zip(notes, told, strict=False):
        assert part in note


@pytest.mark.parametrize("front", range(5))
def test_dense_layers_in_front_are_said_as_such(front):
    """Transformers' own class knows no every n-th layer."""
    written = native(num_hidden_layers=4, first_k_dense_replace=front)
    fields = to_model_fields(written, "config.json")
    config = tiny_config(**NATIVE, num_layers=4, moe_layer_freq=fields["moe_layer_freq"])
    again = to_deepseek_v2_config(config)
    assert (again["first_k_dense_replace"], again["moe_layer_freq"]) == (front, 1)


def test_rope_in_the_spelling_of_transformers_5():
    hf = to_hf_config(tiny_config())
    rope = {**hf.pop("rope_scaling"), "rope_theta": hf.pop("rope_theta")}
    rope["rope_type"] = rope.pop("type")
    fields = to_model_fields({**hf, "rope_parameters": rope}, "config.json")
    assert fields == to_model_fields(to_hf_config(tiny_config()), "config.json")


def test_the_shipped_model_code_knows_the_same_keys_of_ours() -> None:
    assert OWN == OWN_KEYS
