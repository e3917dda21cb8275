"""Keys of experts, layers and routers, both ways."""

from __future__ import annotations

from typing import Any

from megatron_coe.conversion.hf_config.keys import JSON, Config
from megatron_coe.model.config import CoEConfig


def to_keys(config: CoEConfig) -> Config:
    """Return the keys of the experts, of the layers that have them, and of their routers.

    Raises: ValueError naming a field that Hugging Face's format cannot express.
    """
    return _layer_keys(config) | _router_keys(config)


def to_fields(hf: Config) -> dict[str, JSON]:
    """Return the model fields for the keys that `to_keys` writes.

    Raises: ValueError naming a key that is not supported; KeyError for one that is missing.
    """
    return _layer_fields(hf) | _router_fields(hf)


def _layer_keys(config: CoEConfig) -> Config:
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
        "num_nextn_predict_layers": config.mtp_num_layers or 0,
    }


def _layer_fields(hf: Config) -> dict[str, JSON]:
    first, every = hf["first_k_dense_replace"], hf["moe_layer_freq"]
    layers = range(hf["num_hidden_layers"])
    pattern = [int(layer >= first and layer % every == 0) for layer in layers]
    later = hf["num_nextn_predict_layers"]
    return {
        "moe_shared_expert_intermediate_size": (hf["n_shared_experts"] or 0)
        * hf["moe_intermediate_size"]
        or None,
        "moe_layer_freq": pattern if first else every,
        **({"mtp_num_layers": later} if later else {}),
    }


def _dense_layers(pattern: list[int]) -> tuple[int, int]:
    """Return (`first_k_dense_replace`, `moe_layer_freq`) of a pattern with 1 for each CoE layer."""
    # Prefer dense layers in front to every n-th: transformers' own class knows only those.
    for every in range(1, len(pattern) + 1):
        for first in range(len(pattern) + 1):
            if pattern == [int(i >= first and i % every == 0) for i in range(len(pattern))]:
                return first, every
    raise ValueError(
        f"moe_layer_freq={pattern} cannot be expressed in the Hugging Face format: dense layers "
        "first, and then every n-th layer a CoE layer"
    )


def _router_keys(config: CoEConfig) -> Config:
    softmax = config.moe_router_score_function == "softmax"
    scaling = config.moe_router_topk_scaling_factor or 1.0
    # Softmax over the chosen experts is softmax over all of them, renormalized. Sigmoid scores of
    # several experts always are renormalized.
    normalized = not config.moe_router_pre_softmax if softmax else config.moe_router_topk > 1
    if softmax and normalized and scaling != 1:
        raise ValueError(
            f"moe_router_topk_scaling_factor={scaling} with moe_router_pre_softmax=False cannot be "
            "expressed in the Hugging Face format, where norm_topk_prob excludes a factor"
        )
    kinds: Any = config.moe_router_load_balancing_type
    coefficients: Any = config.moe_aux_loss_coeff
    if isinstance(kinds, str):
        kinds, coefficients = [kinds], [coefficients]
    losses = dict(zip(kinds, coefficients, strict=True))
    per_sequence = "seq_aux_loss" in losses or not losses.get("aux_loss")
    return {
        "norm_topk_prob": normalized,
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
    normalized, alpha = hf["norm_topk_prob"], hf["aux_loss_alpha"]
    balancing = "seq_aux_loss" if hf["seq_aux"] else "aux_loss"
    return {
        "moe_router_score_function": hf["scoring_func"],
        "moe_router_pre_softmax": softmax and not normalized,
        # DeepSeek-V2 scales only what it does not normalize.
        "moe_router_topk_scaling_factor": None
        if scaling == 1 or (softmax and normalized)
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
