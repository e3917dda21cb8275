"""The configuration both ways: `CoEConfig` -> `config.json` -> model fields."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_coe.conversion.hf_config import attention, experts, residual
from megatron_coe.conversion.hf_config.keys import (
    DEEPSEEK_V2,
    DEFAULTS,
    IDENTITY,
    INEXPRESSIBLE,
    JSON,
    MODEL_TYPE,
    OWN,
    OWN_YARN,
    SAME,
    Config,
    check_keys,
)
from megatron_coe.model.config import CoEConfig


def to_hf_config(config: CoEConfig) -> Config:
    """Return `config.json` of a model, without what only a tokenizer knows.

    Raises: ValueError naming a field that Hugging Face's format cannot express.
    """
    for field, value in INEXPRESSIBLE.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"{field}={getattr(config, field)!r} cannot be expressed in the Hugging Face "
                f"format, which knows {value!r} only"
            )
    result = IDENTITY | {key: getattr(config, field) for key, field in SAME.items()}
    result |= residual.to_keys(config.coe_residual)
    result |= attention.to_keys(config) | experts.to_keys(config)
    result |= {"hidden_act": "silu", "use_cache": True}
    return {key: value for key, value in result.items() if key not in OWN or value != OWN[key]}


def to_model_fields(hf: Mapping[str, JSON], source: object) -> dict[str, JSON]:
    """Return section `model` of a run's settings for a Hugging Face configuration.

    Args:
        hf: the content of `config.json`.
        source: the file, for messages.

    Raises: ValueError for a key that is missing, unknown, contradicts another or is not supported.
    """
    hf = {key: value for key, value in hf.items() if value is not None}
    rope = hf.get("rope_scaling")
    if isinstance(rope, Mapping) and rope.get("rope_type") == OWN_YARN:
        hf = {**hf, "rope_scaling": {**rope, "rope_type": "yarn"}}
    try:
        return _to_fields({**DEFAULTS, **hf})
    except KeyError as error:
        raise ValueError(f"{source}: lacks key {error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def import_notices(hf: Mapping[str, JSON]) -> list[str]:
    """Return what a user has to know of a configuration that two programs read differently."""
    if hf.get("model_type") == DEEPSEEK_V2 and hf.get("norm_topk_prob"):
        return [
            "norm_topk_prob=True: top-k probabilities are normalized instead of scaled, as in "
            f"DeepSeek's own code; transformers' {DEEPSEEK_V2} ignores this key"
        ]
    return []


def _to_fields(hf: Config) -> dict[str, JSON]:
    native = hf.get("model_type") == DEEPSEEK_V2
    if not native and hf.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"model_type={hf.get('model_type')!r} is unknown: known are {MODEL_TYPE!r} and "
            f"{DEEPSEEK_V2!r}"
        )
    check_keys(hf, native)
    if native:
        hf = {**hf, "inner_iter": 1, "residual": "outer", "use_igate": False}
    hf = hf | attention.read_rope(hf)
    fields = {field: hf[key] for key, field in SAME.items()}
    fields["coe_residual"] = residual.read(hf)
    return fields | attention.to_fields(hf) | experts.to_fields(hf)
