"""Which settings may change between a checkpoint and the run that goes on from it: one table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_coe.checkpoint.tokenizer import describe_identity, tokenizer_difference
from megatron_coe.config.run_config import Settings, TrainSettings, warmup_steps
from megatron_coe.data.tokenizer import Tokenizer
from megatron_coe.model.provider import CoEModelProvider


class Policy(Enum):
    """What becomes of a change."""

    SAFE = "goes unsaid: the numbers stay the same, up to the order of sums"
    SAID = "is printed: training goes on, differently"
    REFUSED = "ends the run: the model or its data would mean something else"


_SAFE, _SAID, _REFUSED = Policy.SAFE, Policy.SAID, Policy.REFUSED

RULES: tuple[tuple[str, Policy], ...] = (
    ("log.*", _SAFE),
    ("checkpoint.*", _SAFE),
    ("parallel.*", _SAFE),
    ("data.tokenizer", _SAFE),  # it may move; its content is compared, see `tokenizer_change`
    ("data.valid", _SAFE),
    ("data.cache", _SAFE),
    ("data.*", _REFUSED),  # of the training sets, the content is compared: see `data_change`
    ("train.stop_step", _SAFE),
    ("train.micro_batch_size", _SAFE),
    ("train.eval_*", _SAFE),
    ("train.nonfinite", _SAFE),
    ("train.max_skipped_steps", _SAFE),
    ("train.hang_timeout_s", _SAFE),
    # The learning rate's schedule spans them: see `_keeps_schedule`.
    ("train.steps", _REFUSED),
    ("train.seed", _REFUSED),
    ("train.global_batch_size", _REFUSED),
    ("train.precision", _REFUSED),
    ("train.*", _SAID),
    ("model.backend", _SAFE),
    ("model.recompute_*", _SAFE),
    ("model.*_fusion", _SAFE),
    ("model.moe_token_dispatcher_type", _SAFE),
    ("model.moe_grouped_gemm", _SAFE),
    ("model.attention_backend", _SAFE),
    ("model.*_dropout", _SAID),
    ("model.moe_aux_loss_coeff", _SAID),
    ("model.moe_z_loss_coeff", _SAID),
    ("model.moe_router_bias_update_rate", _SAID),
    ("model.*", _REFUSED),
    ("*", _SAID),
)
"""Patterns of keys; the first that matches decides."""

_TOKENIZER = "data.tokenizer"
DATA = "data.train"
_LENGTH = "model.seq_length"


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was."""

    key: str
    before: object
    now: object
    is_refused: bool

    def __str__(self) -> str:
        return f"{self.key} was {self.before!r} and is {self.now!r}"


def policy_of(key: str) -> Policy:
    return next(policy for pattern, policy in RULES if fnmatchcase(key, pattern))


def changes(
    before: Settings, now: Settings, model_only: bool = False, step: int = 0
) -> list[Change]:
    """All changes that are worth saying or refused, by key.

    Args:
        model_only: leave out what is not the model's (how long its sequences are is not).
        step: of the checkpoint.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    found = []
    for key in sorted(old.keys() | new.keys()):
        policy = policy_of(key)
        is_models = key.startswith("model.") and key != _LENGTH
        if policy is _SAFE or (model_only and not is_models):
            continue
        values = [_value(key, side) for side in (old, new)]
        if _comparable(key, values[0]) != _comparable(key, values[1]):
            keeps = key == "train.steps" and _keeps_schedule(before.train, now.train, step)
            found.append(Change(key, *values, is_refused=policy is _REFUSED and not keeps))
    return found


def _keeps_schedule(before: TrainSettings, now: TrainSettings, step: int) -> bool:
    """Whether another number of steps leaves the learning rate as it is: constant, warmed up."""
    return all(
        train.lr_decay_style == "constant" and step >= warmup_steps(train)
        for train in (before, now)
    )


def tokenizer_change(checkpoint: Path, tokenizer: Tokenizer) -> Change | None:
    """Compare the tokenizer with the one whose ids a checkpoint has learned."""
    if difference := tokenizer_difference(checkpoint, tokenizer):
        return Change(_TOKENIZER, *map(describe_identity, difference), is_refused=True)
    return None


def data_change(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> Change | None:
    """Compare the content of the training sets, in their order, whatever they are called."""
    if len(before) == len(now):
        pairs = zip(before, now, strict=True)
        differing = [pair for pair in pairs if _without_name(pair[0]) != _without_name(pair[1])]
        if not differing:
            return None
        before, now = map(list, zip(*differing, strict=True))
    return Change(DATA, _described(before), _described(now), is_refused=True)


def _without_name(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "name"}


def _described(data: list[dict[str, Any]]) -> str:
    return "; ".join(
        f"{each['name']}: {each['documents']:,} documents, {each['tokens']:,} tokens, SHA-256 "
        f"{each['sha256'][:12]}…"
        for each in data
    )


def _flat(settings: Settings) -> Iterator[tuple[str, object]]:
    for section, values in asdict(settings).items():
        for name, value in values.items():
            yield f"{section}.{name}", value


def _value(key: str, side: dict[str, object]) -> object:
    """A setting, or the model's default for one that is not given."""
    if key in side or not key.startswith("model."):
        return side.get(key)
    field = next((f for f in fields(CoEModelProvider) if f"model.{f.name}" == key), None)
    if field is None or field.default is MISSING:
        return None
    return field.default


def _comparable(key: str, value: object) -> object:
    if key == DATA and isinstance(value, list):
        return [os.path.abspath(path) for path in value]
    return value
