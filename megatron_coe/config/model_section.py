"""From settings to a model configuration: section `model` checked against `CoEModelProvider`."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from megatron_coe.config.run_config import ParallelSettings, Settings, suggestion
from megatron_coe.megatron_compat.versions import MEGATRON_VERSION, RETIRED_FIELDS
from megatron_coe.model.provider import CoEModelProvider

# Fields of Megatron's configuration that other settings decide.
_DECIDED_ELSEWHERE = {
    **{f.name: f"parallel.{f.name}" for f in fields(ParallelSettings)},
    **dict.fromkeys(
        ("bf16", "fp16", "params_dtype", "pipeline_dtype", "autocast_dtype", "enable_autocast"),
        "train.precision",
    ),
    "deterministic_mode": "train.deterministic",
    "calculate_per_token_loss": "the training loop, whose loss is per token of the global batch",
    "batch_p2p_comm": "parallel.virtual_pipeline_model_parallel_size",
    "overlap_p2p_comm": "parallel.virtual_pipeline_model_parallel_size",
}


_COUNTS = (
    *("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "num_query_groups"),
    *("kv_channels", "kv_lora_rank", "q_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim"),
    *("v_head_dim", "num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk", "coe_iterations"),
    *("make_vocab_size_divisible_by", "rotary_base", "layernorm_epsilon", "recompute_num_layers"),
    *("rotary_scaling_factor", "original_max_position_embeddings"),
)
_SHARES = ("hidden_dropout", "attention_dropout")
_NOT_NEGATIVE = (
    *("init_method_std", "vocab_size", "moe_aux_loss_coeff", "moe_z_loss_coeff", "mtp_num_layers"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_shared_expert_intermediate_size"),
)
_CHOICES = {
    "normalization": ("RMSNorm", "LayerNorm"),
    "moe_router_load_balancing_type": ("seq_aux_loss", "aux_loss", "global_aux_loss", "none"),
}


def build_provider(
    settings: Settings, device: torch.device, tokenizer_vocab_size: int | None = None
) -> CoEModelProvider:
    """The model that `settings` describe, as a provider with its layout and precision.

    Args:
        device: what the model will run on; it decides `train.precision=auto`.
        tokenizer_vocab_size: number of ids of the tokenizer, the vocabulary of a model that names
            none of its own (or 0); a model may know more ids than the tokenizer makes, not fewer.

    Raises:
        ValueError: a field of section `model` is unknown, of the wrong type or out of range.
    """
    model = _checked_fields(_without_dropped_fields(settings.model))
    vocab_size = model["vocab_size"] = model.get("vocab_size") or tokenizer_vocab_size or 0
    if tokenizer_vocab_size is not None and 0 < vocab_size < tokenizer_vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is smaller than the {tokenizer_vocab_size} ids of the "
            f"tokenizer {settings.data.tokenizer}: raise it, or leave it out"
        )
    try:
        return CoEModelProvider(
            **model,
            **_layout_fields(settings.parallel),
            **_precision_fields(settings.train.precision, device),
            calculate_per_token_loss=True,  # see megatron_coe.training.loss
            deterministic_mode=settings.train.deterministic and device.type == "cuda",
        )
    except AssertionError as error:  # Megatron's own checks
        raise ValueError(f"model: Megatron refuses these settings: {error}") from error


def _layout_fields(parallel: ParallelSettings) -> dict[str, Any]:
    given = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
    layout = {f.name: getattr(parallel, f.name) for f in fields(parallel) if f.name not in given}
    if parallel.sequence_parallel is None:
        layout["sequence_parallel"] = parallel.tensor_model_parallel_size > 1
    if parallel.virtual_pipeline_model_parallel_size is not None:
        # With Megatron's defaults (False, True) the interleaved schedule computes garbage.
        layout |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return layout


def _precision_fields(precision: str, device: torch.device) -> dict[str, Any]:
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    return {"bf16": bf16, "params_dtype": dtype, "pipeline_dtype": dtype}


def _without_dropped_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """Translate fields that older settings, and the config.yaml of checkpoints, may name."""
    model = dict(model)
    model.pop("coe_merge_weight_gradients", None)  # changed the order of sums only
    is_ours = model.pop("coe_own_dispatchers", True)
    if type(is_ours) is not bool:
        raise ValueError(f"model.coe_own_dispatchers={is_ours!r}: must be true or false")
    if not is_ours and model.get("moe_token_dispatcher_type", "alltoall") == "alltoall":
        model["moe_token_dispatcher_type"] = "megatron_alltoall"
    return model


def _checked_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this line of Megatron-Core has, all of them known and in range."""
    hints = get_type_hints(CoEModelProvider)
    known = {f.name for f in fields(CoEModelProvider) if f.init} - _DECIDED_ELSEWHERE.keys()
    for name, value in model.items():
        if name in RETIRED_FIELDS and name not in known:
            if value not in RETIRED_FIELDS[name]:
                raise ValueError(
                    f"model.{name}={value!r}: megatron-core {MEGATRON_VERSION} has no such field: "
                    "remove it, or use megatron-core 0.16.1 (Python 3.10 or 3.11)"
                )
            continue
        if name in _DECIDED_ELSEWHERE:
            raise ValueError(f"model.{name} is decided by {_DECIDED_ELSEWHERE[name]}: remove it")
        if name not in known:
            raise ValueError(f"unknown key 'model.{name}'{suggestion(name, known)}")
        if not _fits(value, hints[name]):
            raise ValueError(f"model.{name}={value!r}: must be {_describe(hints[name])}")
        _check_range(name, value)
    return {name: value for name, value in model.items() if name in known}


def _check_range(name: str, value: object) -> None:
    """What Megatron takes without a word and fails on later, if it does."""
    for number in value if isinstance(value, list) else [value]:
        if name in _CHOICES and number not in _CHOICES[name]:
            choices = ", ".join(map(repr, _CHOICES[name]))
            raise ValueError(f"model.{name}={value!r}: must be one of {choices}")
        if not isinstance(number, int | float):
            continue
        if name in _COUNTS and not number > 0:
            raise ValueError(f"model.{name}={value}: must be greater than 0")
        if name in _SHARES and not 0 <= number < 1:
            raise ValueError(f"model.{name}={value}: must be in [0, 1)")
        if name in _NOT_NEGATIVE and not number >= 0:
            raise ValueError(f"model.{name}={value}: must be 0 or more")
    if name == "moe_layer_freq" and isinstance(value, int) and value < 1:
        raise ValueError(f"model.{name}={value}: must be 1 (all layers), 2 (every second), …")
    if name == "seq_length" and value < 2:
        raise ValueError(f"model.{name}={value}: must be 2 or more, a token and the one after it")
    if name == "qk_pos_emb_head_dim" and value % 2:
        raise ValueError(f"model.{name}={value}: must be even, rotary embeddings turn pairs")


def _fits(value: object, hint: Any) -> bool:
    """Whether a value read from YAML is of the annotated type (classes of Megatron's never are)."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return type(value) is int
    return hint in (bool, str, type(None)) and isinstance(value, hint)


def _describe(hint: Any) -> str:
    args = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(arg) for arg in args))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if get_origin(hint) is list:
        return f"a list of {_describe(args[0])}"
    plain = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "left out (it cannot be set from a file)"
    return plain.get(hint, "null" if hint is type(None) else "left out (not for files)")
