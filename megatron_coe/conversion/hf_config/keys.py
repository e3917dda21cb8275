"""The table of keys: which are read, which have one supported value, which change no number.

Every key of an imported configuration is in one of these tables or is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import torch.nn.functional as F

JSON: TypeAlias = Any  # as `json.loads` gives it; what a value is must be checked
Config: TypeAlias = dict[str, JSON]

# --- identity ---------------------------------------------------------------------------------

MODEL_TYPE = "coe_deepseekv2"
DEEPSEEK_V2 = "deepseek_v2"
"""The family of standard MoE models: one iteration with the residual mode `outer`."""
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

# --- Hugging Face key -> Megatron field of the same value -------------------------------------

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
LATENT_ATTENTION = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
PLAIN_ATTENTION = {
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "qkv_bias": "add_qkv_bias",
    "use_qk_norm": "qk_layernorm",
}
YARN = {
    "factor": "rotary_scaling_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "original_max_position_embeddings": "original_max_position_embeddings",
}

# --- keys with a rule of their own ------------------------------------------------------------

OWN_YARN = "deepseek_yarn"
"""`rope_type` of DeepSeek's YaRN in `config.json`, beside the `type` that code for it reads:
without our code transformers 5 would take `yarn` for its own, fail, and load no tokenizer."""

RESIDUAL_KEYS = ("residual", "inner_residual", "outer_residual")
COE_KEYS = ("inner_iter", "use_igate", *RESIDUAL_KEYS)
"""Keys of the iterations, which a standard MoE model does not have."""

OTHER_SPELLINGS = (*COE_KEYS, "rope_parameters", "dtype")
"""Keys for what an exported configuration expresses in its own way."""

OWN: Config = {
    "attention_type": "mla",
    "head_dim": None,
    "use_qk_norm": False,
    "qkv_bias": False,
    "latent_norm_eps": 1e-6,
    "use_expert_bias": False,
    "coe_upcycled": False,
    "num_nextn_predict_layers": 0,
}
"""Keys of our own and their defaults, which are never written.

The shipped model code has the same table and cannot share it (it imports nothing of this package,
and importing it would load transformers into every conversion); a test compares the two.
"""

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
"""What a key means when it is absent, as in DeepSeek-V2's configuration."""

_READ = {
    *SAME,
    *LATENT_ATTENTION,
    *PLAIN_ATTENTION,
    *DEFAULTS,
    *OTHER_SPELLINGS,
    "rope_scaling",
    "n_group",
    "topk_group",
    "model_type",
}

# --- keys without a field: the only supported value -------------------------------------------

_IMPLIED: Config = {
    "hidden_act": "silu",
    "attention_bias": False,  # see qkv_bias
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "use_sliding_window": False,
    "pruned_heads": {},
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
}
DEEPSEEK_V2_IMPLIED: Config = {
    "inner_iter": 1,
    "residual": "outer",
    "inner_residual": False,
    "outer_residual": True,
    "scoring_func": "softmax",
    **{key: value for key, value in OWN.items() if key != "head_dim"},
}
"""What transformers' own class of the family computes, which knows none of these keys."""

_ROPE_READ = {*YARN, "type", "rope_type", "rope_theta", "attention_factor"}
_ROPE_IMPLIED: Config = {"truncate": True, "partial_rotary_factor": 1.0}

# --- keys that change no number, as do transformers' private ones (`_…`) ----------------------

_PROVENANCE = {
    "architectures",
    "auto_map",
    "name_or_path",
    "prefix",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
}
_EXECUTION = {
    "attn_implementation",
    "chunk_size_feed_forward",
    "ep_size",
    "experts_implementation",
    "gradient_checkpointing",
    "is_decoder",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "return_dict",
    "save_routing_logits",
    "tf_legacy_loss",
    "tie_last_hidden_states",
    "torchscript",
    "use_cache",
}
_DERIVED = {"head_dim", "qk_head_dim"}
_IDS_LENGTHS_AND_OTHER_HEADS = {
    "bos_token_id",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "eos_token_id",
    "finetuning_task",
    "id2label",
    "label2id",
    "max_position_embeddings",
    "num_labels",
    "pad_token_id",
    "problem_type",
    "sep_token_id",
    "task_specific_params",
}
_GENERATION = {
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
}
_HARMLESS = _PROVENANCE | _EXECUTION | _DERIVED | _IDS_LENGTHS_AND_OTHER_HEADS | _GENERATION

# --- Megatron fields without a key: the only value that can be exported -----------------------

INEXPRESSIBLE = {
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
    "moe_shared_expert_gate": False,
    "moe_apply_probs_on_input": False,
    "moe_expert_capacity_factor": None,
    "moe_router_force_load_balancing": False,
}


def check_keys(hf: Config, native: bool) -> None:
    """Check that every key is read, has its only supported value, or changes no number.

    Args:
        hf: `config.json`, defaults filled in.
        native: whether it is one of transformers' own DeepSeek-V2.

    Raises: ValueError naming the first other key.
    """
    implied = {**_IMPLIED, "num_experts": hf["n_routed_experts"]}
    if native:
        implied |= DEEPSEEK_V2_IMPLIED
    if hf["attention_type"] == "mla":
        implied["num_key_value_heads"] = hf["num_attention_heads"]
    _check(hf, implied, _READ | _HARMLESS)


def check_rope_keys(rope: Mapping[str, JSON], name: str) -> None:
    """Check the keys of `rope_scaling` or `rope_parameters`, whichever `name` says.

    Raises: ValueError naming the first that is not supported.
    """
    _check(rope, _ROPE_IMPLIED, _ROPE_READ, of=f"{name}.")


def _check(keys: Mapping[str, JSON], implied: Config, known: Collection[str], of: str = "") -> None:
    for key, value in keys.items():
        if key in implied and value != implied[key]:
            raise ValueError(f"{of}{key}={value!r} is not supported, only {implied[key]!r}")
        if key not in implied and key not in known and not key.startswith("_"):
            raise ValueError(
                f"{of}{key}={value!r} is not known here and may change what the model computes: "
                "delete the key if it does not"
            )
