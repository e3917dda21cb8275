"""From settings to a model configuration: names and types of section `model`.

`megatron_coe.model.field_rules` has the rules for their values.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from megatron_coe.config.loader import suggestion
from megatron_coe.config.run_config import ParallelSettings, Settings
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


def build_provider(
    settings: Settings, device: torch.device, tokenizer_vocab_size: int | None = None
) -> CoEModelProvider:
    """Return the model that `settings` describe, as a provider with its layout and precision.

    Args:
        device: what the model will run on; it decides `train.precision=auto`.
        tokenizer_vocab_size: number of ids of the tokenizer, the vocabulary of a model that names
            none of its own (or 0); a model may know more ids than the tokenizer makes, not fewer.

    Raises:
        ValueError: a field of section `model` is unknown, of the wrong type or out of range.
    """
    model = _checked_fields(settings.model)
    vocab_size = model["vocab_size"] = model.get("vocab_size") or tokenizer_vocab_size or 0
    if tokenizer_vocab_size is not None and 0 < vocab_size < tokenizer_vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is smaller than the {tokenizer_vocab_size} ids of the "
            f"tokenizer {settings.data.tokenizer}: raise it, or leave it out"
        )
    try:
        provider = CoEModelProvider(
            **model,
            **_layout_fields(settings.parallel),
            **_precision_fields(settings.train.precision, device),
            calculate_per_token_loss=True,  # see megatron_coe.training.loss
            deterministic_mode=settings.train.deterministic and device.type == "cuda",
        )
    except AssertionError as error:  # Megatron's own checks
        raise ValueError(f"model: Megatron refuses these settings: {error}") from error
    _refuse_graphs_of_iterations(provider)
    return provider


def _refuse_graphs_of_iterations(provider: CoEModelProvider) -> None:
    """Refuse what Megatron's own training loop acts on, and this one would ignore."""
    scopes = [*(provider.cuda_graph_scope or []), *getattr(provider, "cuda_graph_modules", [])]
    found = {provider.cuda_graph_impl, *(getattr(scope, "name", scope) for scope in scopes)}
    if "full_iteration" in found:
        raise ValueError(
            "model.cuda_graph_impl and model.cuda_graph_scope ask for full_iteration: coe train "
            "captures no CUDA graph of a whole iteration; leave it out"
        )


def settable_fields() -> dict[str, Any]:
    """Return name -> annotated type of the fields that section `model` takes."""
    hints = get_type_hints(CoEModelProvider)
    known = {f.name for f in fields(CoEModelProvider) if f.init} - _DECIDED_ELSEWHERE.keys()
    return {name: hints[name] for name in hints if name in known}


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


def _checked_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that this version of Megatron-Core has, each known and of its type."""
    known = settable_fields()
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
        if not _fits(value, known[name]):
            raise ValueError(f"model.{name}={value!r}: must be {describe_type(known[name])}")
    return {name: value for name, value in model.items() if name in known}


def _fits(value: object, hint: Any) -> bool:
    """Return whether a value from YAML is of the annotated type (Megatron's classes never are)."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if hint is list:
        return isinstance(value, list)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return type(value) is int
    return hint in (bool, str, type(None)) and isinstance(value, hint)


def describe_type(hint: Any) -> str:
    """Return the words for what a value from YAML of an annotated type is."""
    args = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_type(arg) for arg in args))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if get_origin(hint) is list:
        return f"a list of {describe_type(args[0])}"
    plain = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    plain |= {list: "a list"}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "left out (it cannot be set from a file)"
    return plain.get(hint, "null" if hint is type(None) else "left out (not for files)")
