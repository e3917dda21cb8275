"""Former names and values of settings, which stay readable: in files, overrides and checkpoints.

Everything written has the present ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

FORMER_KEYS = {
    "train.stop_step": "train.exit_step",
    "train.nonfinite": "train.on_nonfinite",
    "checkpoint.keep": "checkpoint.keep_latest",
    "checkpoint.accept_changes": "checkpoint.allow_config_changes",
    "log.wandb_name": "log.wandb_exp_name",
}

FORMER_VALUES = {"data.mode": {"examples": "padded"}}

DROPPED_FIELDS = ("coe_merge_weight_gradients", "coe_own_dispatchers")
"""Fields that section `model` had. The first changed only the order of sums; what the second meant
depends on another field, so `without_dropped_fields` translates it once all is merged."""


def refuse_both(source: str, keys: Iterable[str]) -> None:
    """Raise ValueError where a setting stands under its former and its present name."""
    given = set(keys)
    for former, key in FORMER_KEYS.items():
        if {former, key} <= given:
            raise ValueError(f"{source}: {former} is the former name of {key}: give one of them")


def with_present_names(source: str, sections: dict[str, Any]) -> dict[str, Any]:
    """Return settings, by section, under the present names and values.

    Raises: ValueError: a setting stands under both of its names.
    """
    renamed = dict(sections)
    for section, settings in sections.items():
        if not isinstance(settings, dict):  # the loader reports it
            continue
        refuse_both(source, (f"{section}.{name}" for name in settings))
        renamed[section] = {}
        for name, value in settings.items():
            key = FORMER_KEYS.get(f"{section}.{name}", f"{section}.{name}")
            former = FORMER_VALUES.get(key, {})
            present = former.get(value, value) if isinstance(value, str) else value
            renamed[section][name if key == f"{section}.{name}" else key.split(".")[1]] = present
    return renamed


def without_dropped_fields(model: dict[str, Any]) -> dict[str, Any]:
    """Return section `model`, merged from all its sources, without `DROPPED_FIELDS`.

    Raises: ValueError: the value of one is none that it took.
    """
    present = {name: value for name, value in model.items() if name not in DROPPED_FIELDS}
    is_ours = model.get("coe_own_dispatchers", True)
    if type(is_ours) is not bool:
        raise ValueError(f"model.coe_own_dispatchers={is_ours!r}: must be true or false")
    if not is_ours and present.get("moe_token_dispatcher_type", "alltoall") == "alltoall":
        present["moe_token_dispatcher_type"] = "megatron_alltoall"
    return present
