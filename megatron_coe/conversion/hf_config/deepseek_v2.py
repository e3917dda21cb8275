"""A standard MoE model (one iteration, residual mode `outer`) for transformers' own DeepSeek-V2."""

from __future__ import annotations

from megatron_coe.conversion.hf_config.attention import attention_factor
from megatron_coe.conversion.hf_config.convert import to_hf_config
from megatron_coe.conversion.hf_config.keys import (
    COE_KEYS,
    DEEPSEEK_V2,
    DEEPSEEK_V2_IMPLIED,
    OWN,
    Config,
)
from megatron_coe.model.config import CoEConfig

_VALUES: Config = {"moe_layer_freq": 1, "norm_topk_prob": False, **DEEPSEEK_V2_IMPLIED}
"""What transformers' own class of the family can be."""


def to_deepseek_v2_config(config: CoEConfig) -> Config:
    """Return `config.json` of a model for transformers' own DeepSeek-V2.

    Raises: ValueError naming a key that this class does not support.
    """
    keys = to_hf_config(config)
    for key, value in _VALUES.items():
        if keys.get(key, OWN.get(key)) != value:
            fix = "; leave them out: --without-mtp" if key == "num_nextn_predict_layers" else ""
            raise ValueError(
                f"{key}={keys.get(key)!r} cannot be expressed as {DEEPSEEK_V2}, only {value!r}{fix}"
            )
    if not keys["n_shared_experts"]:
        raise ValueError(
            f"n_shared_experts=0 cannot be expressed as {DEEPSEEK_V2}: it needs one or more"
        )
    keys = {key: value for key, value in keys.items() if key not in (*COE_KEYS, "auto_map")}
    if yarn := keys["rope_scaling"]:  # transformers 4 computes the factor from the quotient
        length = int(yarn["factor"] * yarn["original_max_position_embeddings"])
        keys |= {"max_position_embeddings": length}
    if yarn and not (yarn["mscale"] and yarn["mscale_all_dim"]):
        # Where one is 0, transformers reads neither.
        keys["rope_scaling"] = yarn | {"attention_factor": attention_factor(yarn)}
    return keys | {"model_type": DEEPSEEK_V2, "architectures": ["DeepseekV2ForCausalLM"]}


def deepseek_v2_notes(config: CoEConfig, itemsize: int) -> str:
    """Return a model card's notes on versions of transformers that differ about this model.

    Args:
        itemsize: bytes of one number of the weights.
    """
    notes = []
    if config.rope_type == "yarn" and config.rotary_scaling_factor > 1 and config.mscale_all_dim:
        notes.append(
            "Needs transformers 5.15 or later: the `deepseek_v2` of earlier versions leaves YaRN's "
            "`mscale_all_dim` out of attention and computes other numbers."
        )
    if config.moe_router_group_topk:
        notes.append(
            "The `deepseek_v2` of transformers 5.0 to 5.12 ends in an error with groups of experts."
        )
    if any(size * itemsize % 16 for size in (config.hidden_size, config.moe_ffn_hidden_size)):
        notes.append(
            'Load it with `experts_implementation="eager"` in transformers 5: by default its '
            "experts are computed by `grouped_mm`, which needs rows of a multiple of 16 bytes."
        )
    return "".join(f"\n{note}\n" for note in notes)
