"""Keys of attention and of the rotary embedding, both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_coe.conversion.hf_config.keys import (
    DEEPSEEK_V2,
    JSON,
    LATENT_ATTENTION,
    PLAIN_ATTENTION,
    YARN,
    Config,
    check_rope_keys,
)
from megatron_coe.model.config import CoEConfig


def to_keys(config: CoEConfig) -> Config:
    """Return the keys of a model's attention.

    Raises: ValueError naming a field that Hugging Face's format cannot express.
    """
    if not config.multi_latent_attention:
        keys = {key: getattr(config, field) for key, field in PLAIN_ATTENTION.items()}
        return {"attention_type": "mha", **keys, "attention_bias": False, "rope_scaling": None}
    if config.add_qkv_bias:
        raise ValueError("add_qkv_bias=True cannot be expressed with multi_latent_attention=True")
    if not config.qk_layernorm:
        raise ValueError("qk_layernorm=False cannot be expressed with multi_latent_attention=True")
    keys = {key: getattr(config, field) for key, field in LATENT_ATTENTION.items()}
    keys |= {"num_key_value_heads": config.num_attention_heads, "attention_bias": False}
    keys |= {"latent_norm_eps": config.layernorm_epsilon}
    yarn = {key: getattr(config, field) for key, field in YARN.items()}
    if config.rope_type == "yarn":
        return keys | {"rope_scaling": {"type": "yarn", **yarn}}
    if yarn["factor"] > 1 and yarn["mscale_all_dim"]:
        # Megatron's latent attention scales its scores by these whatever the rope_type.
        raise ValueError(
            f"rotary_scaling_factor={yarn['factor']} with rope_type='rope' and "
            f"mscale_all_dim={yarn['mscale_all_dim']} cannot be expressed in the Hugging Face "
            "format: with rope_type='rope', only rotary_scaling_factor=1 can"
        )
    return keys | {"rope_scaling": None}


def to_fields(hf: Config) -> dict[str, JSON]:
    """Return the model fields of attention and rotary embedding.

    Args:
        hf: `config.json` with the keys of `read_rope`.

    Raises: ValueError naming a key that is not supported; KeyError for one that is missing.
    """
    scaling = hf["rope_scaling"]
    if hf["attention_type"] == "mha":
        if scaling is not None:
            raise ValueError(f"rope_scaling={scaling!r} with plain attention: only null is known")
        hf = {"num_key_value_heads": hf["num_attention_heads"], **hf}
        hf["head_dim"] = hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
        fields = {field: hf[key] for key, field in PLAIN_ATTENTION.items()}
        return {"multi_latent_attention": False, "rope_type": "rope", **fields}
    if hf["attention_type"] != "mla":
        raise ValueError(f"attention_type={hf['attention_type']!r}: known are 'mla' and 'mha'")
    if hf["latent_norm_eps"] != hf["rms_norm_eps"]:
        raise ValueError(
            f"latent_norm_eps={hf['latent_norm_eps']} differs from rms_norm_eps="
            f"{hf['rms_norm_eps']}: Megatron has one epsilon for all norms"
        )
    fields = {field: hf[key] for key, field in LATENT_ATTENTION.items()}
    fields |= {"multi_latent_attention": True, "qk_layernorm": True}
    if scaling is None:
        return fields | {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    return fields | _yarn_fields(scaling, native=hf["model_type"] == DEEPSEEK_V2)


def read_rope(hf: Config) -> Config:
    """Return `rope_theta` and `rope_scaling` (None or YaRN's keys) from either spelling.

    transformers 5 writes both into `rope_parameters`.

    Raises: ValueError when a value is not supported, or the spellings disagree.
    """
    thetas = [hf["rope_theta"]] if "rope_theta" in hf else []
    found: list[Config | None] = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = hf.get(name) or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"{name}={rope!r}: give an object, or null")
        rope = {key: value for key, value in rope.items() if value is not None}
        if not rope:
            continue
        check_rope_keys(rope, name)
        thetas += [rope["rope_theta"]] if "rope_theta" in rope else []
        kinds = [rope[key] for key in ("type", "rope_type") if key in rope]
        if not set(kinds) <= {"yarn"} and not set(kinds) <= {"default"}:
            raise ValueError(f"{name} of type {kinds[-1]!r}: known are 'yarn', or null for none")
        yarn = {key: rope[key] for key in rope if key in (*YARN, "attention_factor")}
        found.append(yarn if "yarn" in kinds else None)
    for what, values in (("rope_theta", thetas), ("rope_scaling and rope_parameters", found)):
        if any(value != values[0] for value in values):
            raise ValueError(f"{what} disagree: {' and '.join(map(repr, values))}")
    return {"rope_theta": [*thetas, 10000][0], "rope_scaling": [*found, None][0]}


def _yarn_fields(scaling: Config, native: bool) -> dict[str, JSON]:
    yarn = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0, **scaling}
    factor, wanted = yarn["factor"], scaling.get("attention_factor")
    if wanted is None and native and not (scaling.get("mscale") and scaling.get("mscale_all_dim")):
        theirs = attention_factor({"factor": factor, "mscale": 1.0, "mscale_all_dim": 0.0})
        if not math.isclose(theirs, attention_factor(yarn)):
            raise ValueError(
                f"rope_scaling: mscale={yarn['mscale']} with mscale_all_dim="
                f"{yarn['mscale_all_dim']}: transformers takes an attention_factor of "
                f"{theirs:.6g} from it, DeepSeek's own code {attention_factor(yarn):.6g}. Give "
                "attention_factor"
            )
    if wanted is not None and not math.isclose(wanted, attention_factor(yarn)):
        if factor <= 1:
            raise ValueError(
                f"rope_scaling: attention_factor={wanted} with factor={factor}: only 1 is supported"
            )
        under = 1 + 0.1 * yarn["mscale_all_dim"] * math.log(factor)
        yarn["mscale"] = (wanted * under - 1) / (0.1 * math.log(factor))
    return {"rope_type": "yarn", **{field: yarn[key] for key, field in YARN.items()}}


def attention_factor(yarn: Mapping[str, float]) -> float:
    """Return YaRN's factor on cosines and sines (DeepSeek's code, and Megatron)."""
    stretch = 0.1 * math.log(max(yarn["factor"], 1))
    return (1 + yarn["mscale"] * stretch) / (1 + yarn["mscale_all_dim"] * stretch)
