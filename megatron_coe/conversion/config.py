"""A model's configuration as Hugging Face has it (`config.json`), and as section `model` of a run.

The keys are DeepSeek-V2's plus those of the authors' models (`inner_iter`, `use_igate`, and two
spellings of the residual mode), so that code made for their checkpoints reads ours. Keys of our own
stand only where theirs cannot say it: see `megatron_coe/hf/configuration_coe.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch.nn.functional as F

from megatron_coe.model.config import CoEConfig

JSON: TypeAlias = "str | int | float | bool | list[JSON] | dict[str, JSON] | None"
Config: TypeAlias = "dict[str, JSON]"

MODEL_TYPE = "coe_deepseekv2"
IDENTITY: Config = {
    "model_type": MODEL_TYPE,
    "architectures": ["CoeForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_coe.CoeConfig",
        "AutoModel": "modeling_coe.CoeModel",
        "AutoModelForCausalLM": "modeling_coe.CoeForCausalLM",
        "AutoModelForSequenceClassification": "modeling_coe.CoeForSequenceClassification",
    },
}

DEEPSEEK_V2 = "deepseek_v2"
"""The family of plain mixtures of experts: a chain of one iteration with the mode `outer`."""

# Hugging Face key -> Megatron field, where both hold the same value.
SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "n_routed_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "inner_iter": "coe_iterations",
    "use_igate": "coe_independent_gate",
    "coe_upcycled": "coe_upcycled",
}
LATENT = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
PLAIN = {
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "qkv_bias": "add_qkv_bias",
    "use_qk_norm": "qk_layernorm",
}
OWN_YARN = "deepseek_yarn"
"""`rope_type` of DeepSeek's YaRN in `config.json`, beside the `type` that code for it reads:
without our code transformers 5 would take `yarn` for its own, fail, and load no tokenizer."""
YARN = {
    "factor": "rotary_scaling_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
BOOLEANS = {  # residual mode -> (inner_residual, outer_residual)
    "inner": (True, False),
    "outer": (False, True),
    "inner_outer": (True, True),
    "none": (False, False),
}
NAMED_RESIDUALS = ("inner", "outer", "addinit", "none")
OTHER_SPELLINGS = (
    *("inner_iter", "use_igate", "inner_residual", "outer_residual", "residual"),
    *("rope_parameters", "dtype"),
)
"""Keys that say of the model what an exported configuration says in its own way."""

# Keys of our own, which stand only where they say something else than this. The shipped model code
# has the same list and cannot share it (it imports nothing of this package, and importing it would
# load transformers into every conversion); a test holds the two together.
OWN: Config = {
    "attention_type": "mla",
    "head_dim": None,
    "use_qk_norm": False,
    "qkv_bias": False,
    "latent_norm_eps": 1e-6,
    "use_expert_bias": False,
    "coe_upcycled": False,
}

# What a key means when it is absent, as DeepSeek-V2's configuration has it.
DEFAULTS: Config = {
    "inner_iter": 1,
    "use_igate": True,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "q_lora_rank": None,
    "n_shared_experts": None,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "topk_method": "greedy",
    **OWN,
}

# --- what becomes of an imported key: it is read, has one value, or changes no number -----------

_READ = {
    *(*SAME, *LATENT, *PLAIN, *DEFAULTS, *OTHER_SPELLINGS, "rope_scaling", "n_group", "topk_group"),
    *("model_type", "inner_residual", "outer_residual"),
}

# Keys without a field that would change what the model computes, and the only value there is.
_IMPLIED: Config = {
    "hidden_act": "silu",
    "attention_bias": False,  # see qkv_bias
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "use_sliding_window": False,
    "num_nextn_predict_layers": 0,
    "pruned_heads": {},
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
}

# Of transformers' own class, which knows none of these keys.
_IMPLIED_BY_DEEPSEEK_V2: Config = {
    "inner_iter": 1,
    "residual": "outer",
    "inner_residual": False,
    "outer_residual": True,
    "scoring_func": "softmax",
    **{key: value for key, value in OWN.items() if key != "head_dim"},
}

# Keys that change no number, as do transformers' private ones, which begin with an underscore.
_HARMLESS = {
    # who wrote the file, and with what it is loaded
    *("architectures", "auto_map", "name_or_path", "transformers_version", "unsloth_version"),
    *("unsloth_fixed", "tokenizer_class", "prefix", "torch_dtype", "use_bfloat16"),
    # how it is run: layouts, implementations, what is returned
    *("ep_size", "pretraining_tp", "attn_implementation", "experts_implementation"),
    *("gradient_checkpointing", "chunk_size_feed_forward", "torchscript", "tf_legacy_loss"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "is_decoder"),
    *("output_router_logits", "save_routing_logits", "tie_last_hidden_states"),
    # follows from others
    *("head_dim", "qk_head_dim"),
    # special ids, lengths, other heads
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("max_position_embeddings", "id2label", "label2id", "num_labels", "problem_type"),
    *("finetuning_task", "task_specific_params", "cross_attention_hidden_size"),
    # of text that is generated
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
    *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id"),
    *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
    *("suppress_tokens", "begin_suppress_tokens"),
}

_ROPE_READ = {*YARN, "type", "rope_type", "rope_theta", "attention_factor"}
_ROPE_IMPLIED: Config = {"truncate": True, "partial_rotary_factor": 1.0}

# Megatron fields that change what the model computes, and the only value that can be said.
_INEXPRESSIBLE = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "window_size": None,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
    "apply_query_key_layer_scaling": False,
    "mtp_num_layers": None,
    "moe_shared_expert_gate": False,
    "moe_apply_probs_on_input": False,
    "moe_expert_capacity_factor": None,
    "moe_router_force_load_balancing": False,
}


def to_hf_config(config: CoEConfig) -> Config:
    """`config.json` of a model, without what only a tokenizer knows.

    Raises: ValueError naming a field that Hugging Face's format cannot express.
    """
    for field, value in _INEXPRESSIBLE.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"{field}={getattr(config, field)!r} cannot be expressed in the Hugging Face "
                f"format, which knows {value!r} only"
            )
    result = IDENTITY | {key: getattr(config, field) for key, field in SAME.items()}
    result |= _residual_keys(config.coe_residual)
    result |= _attention_keys(config) | _expert_keys(config) | _router_keys(config)
    result |= {"hidden_act": "silu", "use_cache": True}
    return {key: value for key, value in result.items() if key not in OWN or value != OWN[key]}


# What transformers' own class of the family can be, and keys that it does not know.
_DEEPSEEK_V2_VALUES: Config = {
    "inner_iter": 1,
    "residual": "outer",
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    **OWN,
}
_CHAIN_KEYS = ("inner_iter", "use_igate", "inner_residual", "outer_residual", "residual")


def to_deepseek_v2_config(config: CoEConfig) -> Config:
    """`config.json` of a model for transformers' own DeepSeek-V2.

    Raises: ValueError naming a key that this class cannot have.
    """
    keys = to_hf_config(config)
    for key, value in _DEEPSEEK_V2_VALUES.items():
        if key != "head_dim" and keys.get(key, OWN.get(key)) != value:
            raise ValueError(
                f"{key}={keys.get(key)!r} cannot be had as {DEEPSEEK_V2}, only {value!r}"
            )
    if not keys["n_shared_experts"]:
        raise ValueError(f"n_shared_experts=0 cannot be had as {DEEPSEEK_V2}: it needs one or more")
    keys = {key: value for key, value in keys.items() if key not in (*_CHAIN_KEYS, "auto_map")}
    if yarn := keys["rope_scaling"]:  # transformers 4 computes the factor from the quotient
        length = int(yarn["factor"] * yarn["original_max_position_embeddings"])
        keys |= {"max_position_embeddings": length}
    if yarn and not (yarn["mscale"] and yarn["mscale_all_dim"]):
        # Where one is 0, transformers reads neither.
        keys["rope_scaling"] = yarn | {"attention_factor": _attention_factor(yarn)}
    return keys | {"model_type": DEEPSEEK_V2, "architectures": ["DeepseekV2ForCausalLM"]}


def deepseek_v2_notes(config: CoEConfig, itemsize: int) -> str:
    """What a model card says of transformers' versions, if they differ about this model.

    Args:
        itemsize: bytes of a number of the weights.
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
            "experts are computed by `grouped_mm`, which wants rows of a multiple of 16 bytes."
        )
    return "".join(f"\n{note}\n" for note in notes)


def to_model_fields(hf: Mapping[str, JSON], source: object) -> dict[str, JSON]:
    """Section `model` of a run's settings for a Hugging Face configuration.

    Args:
        source: the file, for messages.

    Raises: ValueError for a key that is missing, unknown, contradicts another or cannot be had in
        Megatron.
    """
    hf = {key: value for key, value in hf.items() if value is not None}
    rope = hf.get("rope_scaling")
    if isinstance(rope, Mapping) and rope.get("rope_type") == OWN_YARN:
        hf = {**hf, "rope_scaling": {**rope, "rope_type": "yarn"}}
    try:
        return _to_model_fields({**DEFAULTS, **hf})
    except KeyError as error:
        raise ValueError(f"{source}: lacks key {error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def import_notices(hf: Mapping[str, JSON]) -> list[str]:
    """What to say of a configuration that two programs read differently."""
    if hf.get("model_type") == DEEPSEEK_V2 and hf.get("norm_topk_prob"):
        return [
            "norm_topk_prob=True: the weights of the chosen experts are normalized instead of "
            f"scaled, as DeepSeek's own code does; transformers' {DEEPSEEK_V2} ignores this key"
        ]
    return []


def _to_model_fields(hf: Config) -> dict[str, JSON]:
    native = hf.get("model_type") == DEEPSEEK_V2
    if not native and hf.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"model_type={hf.get('model_type')!r} is unknown: known are {MODEL_TYPE!r} and "
            f"{DEEPSEEK_V2!r}"
        )
    _check_keys(hf, native)
    if native:
        hf = {**hf, "inner_iter": 1, "residual": "outer", "use_igate": False}
    hf = hf | _rotary_keys(hf)
    fields = {field: hf[key] for key, field in SAME.items()}
    fields["coe_residual"] = read_residual(hf)
    return fields | _attention_fields(hf) | _expert_fields(hf) | _router_fields(hf)


def _check_keys(hf: Config, native: bool) -> None:
    """Every key is read, says what it must, or changes no number."""
    implied = {**_IMPLIED, "num_experts": hf["n_routed_experts"]}
    if native:
        implied |= _IMPLIED_BY_DEEPSEEK_V2
    if hf["attention_type"] == "mla":
        implied["num_key_value_heads"] = hf["num_attention_heads"]
    _check_implied(hf, implied, {*_READ, *_HARMLESS})


def _check_implied(
    keys: Mapping[str, JSON], implied: Config, known: set[str], of: str = ""
) -> None:
    """Raises: ValueError for a key that is neither known nor has the value that is implied."""
    for key, value in keys.items():
        if key in implied and value != implied[key]:
            raise ValueError(f"{of}{key}={value!r} cannot be had here, only {implied[key]!r}")
        if key not in implied and key not in known and not key.startswith("_"):
            raise ValueError(
                f"{of}{key}={value!r} is not known here and may change what the model computes: "
                "delete the key if it does not"
            )


# --- residual modes ---------------------------------------------------------------------------


def _residual_keys(mode: str) -> Config:
    keys: Config = {}
    if mode in BOOLEANS:
        keys["inner_residual"], keys["outer_residual"] = BOOLEANS[mode]
    if mode in NAMED_RESIDUALS:
        keys["residual"] = mode
    return keys


def read_residual(hf: Mapping[str, JSON]) -> str:
    """The residual mode that either spelling says; ValueError where they disagree."""
    named = hf.get("residual")
    if named is not None and named not in NAMED_RESIDUALS:
        raise ValueError(f"residual={named!r}: known are {', '.join(NAMED_RESIDUALS)}")
    booleans = (hf.get("inner_residual"), hf.get("outer_residual"))
    if booleans == (None, None):
        return named or "inner"
    mode = next((mode for mode, pair in BOOLEANS.items() if pair == booleans), None)
    if mode is None:
        raise ValueError(
            f"inner_residual={booleans[0]!r}, outer_residual={booleans[1]!r}: give true or false "
            "for both"
        )
    if named not in (None, mode):
        raise ValueError(
            f"residual={named!r} disagrees with inner_residual={booleans[0]!r} and "
            f"outer_residual={booleans[1]!r}, which say {mode!r}"
        )
    return mode


# --- attention --------------------------------------------------------------------------------


def _attention_keys(config: CoEConfig) -> Config:
    if not config.multi_latent_attention:
        keys = {key: getattr(config, field) for key, field in PLAIN.items()}
        return {"attention_type": "mha", **keys, "attention_bias": False, "rope_scaling": None}
    if config.add_qkv_bias:
        raise ValueError("add_qkv_bias=True cannot be expressed with multi_latent_attention=True")
    if not config.qk_layernorm:
        raise ValueError("qk_layernorm=False cannot be expressed with multi_latent_attention=True")
    keys = {key: getattr(config, field) for key, field in LATENT.items()}
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


def _attention_fields(hf: Config) -> dict[str, JSON]:
    scaling = hf["rope_scaling"]
    if hf["attention_type"] == "mha":
        if scaling is not None:
            raise ValueError(f"rope_scaling={scaling!r} with plain attention: only null is known")
        hf = {"num_key_value_heads": hf["num_attention_heads"], **hf}
        hf["head_dim"] = hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
        fields = {field: hf[key] for key, field in PLAIN.items()}
        return {"multi_latent_attention": False, "rope_type": "rope", **fields}
    if hf["attention_type"] != "mla":
        raise ValueError(f"attention_type={hf['attention_type']!r}: known are 'mla' and 'mha'")
    if hf["latent_norm_eps"] != hf["rms_norm_eps"]:
        raise ValueError(
            f"latent_norm_eps={hf['latent_norm_eps']} differs from rms_norm_eps="
            f"{hf['rms_norm_eps']}: Megatron has one epsilon for all norms"
        )
    fields = {field: hf[key] for key, field in LATENT.items()}
    fields |= {"multi_latent_attention": True, "qk_layernorm": True}
    if scaling is None:
        return fields | {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    return fields | _yarn_fields(scaling, native=hf["model_type"] == DEEPSEEK_V2)


def _rotary_keys(hf: Config) -> Config:
    """`rope_theta` and `rope_scaling`, None or YaRN's keys, whichever their spelling: transformers
    5 writes both into `rope_parameters`."""
    thetas = [hf["rope_theta"]] if "rope_theta" in hf else []
    found: list[Config | None] = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = hf.get(name) or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"{name}={rope!r}: give an object, or null")
        rope = {key: value for key, value in rope.items() if value is not None}
        if not rope:
            continue
        _check_implied(rope, _ROPE_IMPLIED, _ROPE_READ, of=f"{name}.")
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
        theirs = _attention_factor({"factor": factor, "mscale": 1.0, "mscale_all_dim": 0.0})
        if not math.isclose(theirs, _attention_factor(yarn)):
            raise ValueError(
                f"rope_scaling: mscale={yarn['mscale']} with mscale_all_dim="
                f"{yarn['mscale_all_dim']}: transformers makes it an attention_factor of "
                f"{theirs:.6g}, DeepSeek's own code one of {_attention_factor(yarn):.6g}. Say "
                "which by this key"
            )
    if wanted is not None and not math.isclose(wanted, _attention_factor(yarn)):
        if factor <= 1:
            raise ValueError(
                f"rope_scaling: attention_factor={wanted} with factor={factor}: only 1 can be had"
            )
        under = 1 + 0.1 * yarn["mscale_all_dim"] * math.log(factor)
        yarn["mscale"] = (wanted * under - 1) / (0.1 * math.log(factor))
    return {"rope_type": "yarn", **{field: yarn[key] for key, field in YARN.items()}}


def _attention_factor(yarn: Mapping[str, float]) -> float:
    """What YaRN multiplies the cosines and sines by (DeepSeek's code, and Megatron)."""
    stretch = 0.1 * math.log(max(yarn["factor"], 1))
    return (1 + yarn["mscale"] * stretch) / (1 + yarn["mscale_all_dim"] * stretch)


# --- experts and layers -----------------------------------------------------------------------


def _expert_keys(config: CoEConfig) -> Config:
    size = config.moe_shared_expert_intermediate_size or 0
    if size % config.moe_ffn_hidden_size:
        raise ValueError(
            f"moe_shared_expert_intermediate_size={size} cannot be expressed in the Hugging Face "
            f"format: it must be a multiple of moe_ffn_hidden_size={config.moe_ffn_hidden_size}"
        )
    first, every = _dense_layers(config.moe_layer_pattern)
    return {
        "n_shared_experts": size // config.moe_ffn_hidden_size or None,
        "first_k_dense_replace": first,
        "moe_layer_freq": every,
    }


def _expert_fields(hf: Config) -> dict[str, JSON]:
    first, every = hf["first_k_dense_replace"], hf["moe_layer_freq"]
    layers = range(hf["num_hidden_layers"])
    pattern = [int(layer >= first and layer % every == 0) for layer in layers]
    return {
        "moe_shared_expert_intermediate_size": (hf["n_shared_experts"] or 0)
        * hf["moe_intermediate_size"]
        or None,
        "moe_layer_freq": pattern if first else every,
    }


def _dense_layers(pattern: list[int]) -> tuple[int, int]:
    """(`first_k_dense_replace`, `moe_layer_freq`) of a pattern with 1 for each CoE layer."""
    # Rather dense layers in front than every n-th: transformers' own class knows those alone.
    for every in range(1, len(pattern) + 1):
        for first in range(len(pattern) + 1):
            if pattern == [int(i >= first and i % every == 0) for i in range(len(pattern))]:
                return first, every
    raise ValueError(
        f"moe_layer_freq={pattern} cannot be expressed in the Hugging Face format: dense layers "
        "first, and then every n-th layer a CoE layer"
    )


# --- routers ----------------------------------------------------------------------------------


def _router_keys(config: CoEConfig) -> Config:
    softmax = config.moe_router_score_function == "softmax"
    scaling = config.moe_router_topk_scaling_factor or 1.0
    # Softmax over the chosen experts alone is softmax over all of them, renormalised. Sigmoid
    # scores of several experts always are.
    normalised = not config.moe_router_pre_softmax if softmax else config.moe_router_topk > 1
    if softmax and normalised and scaling != 1:
        raise ValueError(
            f"moe_router_topk_scaling_factor={scaling} with moe_router_pre_softmax=False cannot be "
            "expressed in the Hugging Face format, where norm_topk_prob excludes a factor"
        )
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(kinds, str):
        kinds, coefficients = [kinds], [coefficients]
    losses = dict(zip(kinds, coefficients, strict=True))
    per_sequence = "seq_aux_loss" in losses or not losses.get("aux_loss")
    return {
        "norm_topk_prob": normalised,
        "routed_scaling_factor": scaling,
        "scoring_func": config.moe_router_score_function,
        **_group_keys(config),
        "use_expert_bias": config.moe_router_enable_expert_bias,
        "aux_loss_alpha": losses.get("seq_aux_loss" if per_sequence else "aux_loss", 0.0),
        "seq_aux": per_sequence,
    }


def _router_fields(hf: Config) -> dict[str, JSON]:
    if hf["scoring_func"] not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring_func={hf['scoring_func']!r}: known here are softmax, sigmoid")
    softmax, scaling = hf["scoring_func"] == "softmax", hf["routed_scaling_factor"]
    normalised, alpha = hf["norm_topk_prob"], hf["aux_loss_alpha"]
    balancing = "seq_aux_loss" if hf["seq_aux"] else "aux_loss"
    return {
        "moe_router_score_function": hf["scoring_func"],
        "moe_router_pre_softmax": softmax and not normalised,
        # DeepSeek-V2 scales only what it does not normalise.
        "moe_router_topk_scaling_factor": None
        if scaling == 1 or (softmax and normalised)
        else scaling,
        **_group_fields(hf),
        "moe_router_enable_expert_bias": hf["use_expert_bias"],
        "moe_router_load_balancing_type": balancing if alpha else "none",
        "moe_aux_loss_coeff": alpha or 0.0,
    }


def _group_keys(config: CoEConfig) -> Config:
    groups, kept = config.moe_router_num_groups, config.moe_router_group_topk
    if not kept:
        return {"topk_method": "greedy"}
    if config.moe_router_group_score != "max" and config.moe_router_topk // kept > 1:
        raise ValueError(
            f"moe_router_group_score={config.moe_router_group_score!r} with moe_router_topk="
            f"{config.moe_router_topk} and moe_router_group_topk={kept} cannot be expressed in the "
            "Hugging Face format, where a group is as good as its best expert ('max')"
        )
    return {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": kept}


def _group_fields(hf: Config) -> dict[str, JSON]:
    if hf["topk_method"] in ("greedy", "gready"):  # the latter is DeepSeek-V2's own default
        return {}
    if hf["topk_method"] != "group_limited_greedy":
        raise ValueError(
            f"topk_method={hf['topk_method']!r}: known here are greedy, group_limited_greedy"
        )
    return {
        "moe_router_num_groups": hf["n_group"],
        "moe_router_group_topk": hf["topk_group"],
        "moe_router_group_score": "max",
    }
