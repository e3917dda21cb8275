"""The authors' keys: both spellings of the residual, rope in every spelling, and ours."""

from __future__ import annotations

import json

import pytest

from megatron_coe.hf import CoeConfig
from tests.golden import CASES, GOLDEN
from tests.unit.hf.small import KINDS, YARN, small_config

SPELLINGS = {
    "inner": {"inner_residual": True, "outer_residual": False, "residual": "inner"},
    "outer": {"inner_residual": False, "outer_residual": True, "residual": "outer"},
    "addinit": {"residual": "addinit"},
    "inner_outer": {"inner_residual": True, "outer_residual": True},
    "none": {"inner_residual": False, "outer_residual": False, "residual": "none"},
}


def written(config: CoeConfig) -> dict:
    return json.loads(config.to_json_string())


@pytest.mark.parametrize("mode", SPELLINGS)
def test_either_spelling_is_read_and_both_are_written(mode, tmp_path):
    both = SPELLINGS[mode]
    key = {name: value for name, value in both.items() if name == "residual"}
    booleans = {name: value for name, value in both.items() if name != "residual"}
    for spelling in filter(None, (both, key, booleans)):
        config = small_config(**spelling)
        assert config.residual_mode == mode
        keys = written(config)
        assert {name: keys[name] for name in SPELLINGS["inner"] if name in keys} == both
        config.save_pretrained(tmp_path)
        assert CoeConfig.from_pretrained(tmp_path).residual_mode == mode


def test_neither_spelling_is_inner():
    assert small_config().residual_mode == "inner"


def test_disagreement_is_an_error():
    with pytest.raises(ValueError, match=r"residual='outer' disagrees .*inner_residual=True"):
        small_config(residual="outer", inner_residual=True, outer_residual=False)
    with pytest.raises(ValueError, match="disagrees"):
        small_config(residual="addinit", inner_residual=False, outer_residual=False)


@pytest.mark.parametrize("case", CASES)
def test_the_authors_keys_come_back(case):
    theirs = json.loads((GOLDEN / case / "config.json").read_text())
    ours = written(CoeConfig.from_pretrained(GOLDEN / case))
    other = {"transformers_version", "_name_or_path"}
    assert {key: ours.get(key) for key in theirs.keys() - other} == {
        key: value for key, value in theirs.items() if key not in other
    }
    assert ours.keys() - theirs.keys() <= set(SPELLINGS["inner"])


@pytest.mark.parametrize("scaling", [None, YARN])
def test_rope_is_read_in_both_spellings_and_written_as_the_authors_do(scaling):
    old = small_config(rope_theta=5000.0, rope_scaling=scaling)
    parameters = {**(scaling or {}), "rope_theta": 5000.0}
    parameters["rope_type"] = parameters.pop("type", "default")
    new = small_config(rope_scaling=None, rope_parameters=parameters)
    assert old.rope_parameters == new.rope_parameters
    for config in (old, new):
        keys = written(config)
        assert (keys["rope_theta"], keys["rope_scaling"]) == (5000.0, scaling)
        assert "rope_parameters" not in keys
        assert CoeConfig.from_dict(keys).rope_parameters == parameters


def test_the_default_of_deepseek_v2_is_read_as_it_is_spelled():
    assert small_config(topk_method="gready").topk_method == "greedy"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_and_says_only_what_it_must(kind, tmp_path):
    config = small_config(**KINDS[kind])
    config.save_pretrained(tmp_path)
    again = CoeConfig.from_pretrained(tmp_path)
    assert written(again) == written(config)
    for key, value in KINDS[kind].items():
        assert getattr(again, key) == value
    own = {"attention_type", "head_dim", "use_qk_norm", "qkv_bias", "latent_norm_eps"}
    own |= {"use_expert_bias", "coe_upcycled"}
    assert written(config).keys() & own == KINDS[kind].keys() & own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_type": "gqa"}, "attention_type='gqa'"),
        ({"scoring_func": "tanh"}, "scoring_func='tanh'"),
        ({"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ({"residual": "outside"}, "residual='outside'"),
        ({"inner_iter": 0}, "inner_iter=0"),
        ({"num_experts_per_tok": 8}, "num_experts_per_tok=8"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"topk_method": "group_limited_greedy", "n_group": 2}, "n_group=2"),
        ({"use_expert_bias": True}, "scoring_func='sigmoid'"),
        ({"coe_upcycled": True}, "coe_upcycled=True"),
        (
            {"coe_upcycled": True, "inner_residual": True, "outer_residual": True},
            "coe_upcycled=True with the residual mode 'inner_outer'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
        ({"rope_scaling": {"type": "yarn"}}, "factor"),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_illegal_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)
